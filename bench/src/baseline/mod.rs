//! What the service is measured against, each in its plainest form, and what bounds a measurement.

pub mod delay;
pub mod disk;
pub mod echo;
pub mod plain;
