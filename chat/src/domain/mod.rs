//! The rules: dialogs, rooms, slots, placement, topology, ownership. Pure: no async, no clock, no
//! randomness, no file. The store, the coordinator, the model and the simulation use the same
//! functions.

pub mod dialog;
pub mod room;
pub mod slot;

pub mod ring;
pub mod shards_file;
pub mod topology;

pub mod ownership;
pub mod failover;
