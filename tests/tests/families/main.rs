//! Every family that is linked: its numbers, its properties, its refusals.

mod batches;
mod checkpoints;
mod convert;
mod goldens;
mod memory;
mod models;
mod properties;
mod refusals;

use mesh_families as _;
