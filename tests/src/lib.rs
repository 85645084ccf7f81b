//! What every implementation of a contract has to show, as functions over `&dyn`, and where the goldens are. The cases
//! themselves are in `tests/`.

pub mod engine;
pub mod hub;
pub mod schemas;
pub mod shared;
