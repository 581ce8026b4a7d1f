//! From a stored message to the screens: what a session is sent, in which order, and how losses are
//! noticed.

pub mod outbound_queue;
pub mod sequencer;
mod read_marks;
pub mod subscriber;
pub mod registry;

mod hints;
mod fan_out;

pub mod presence;
pub mod catchup;
mod reconcile;

pub use fan_out::{Delivery, encode};
pub use reconcile::Reconcile;
