//! Every family that is linked: its numbers, its properties, its refusals.

mod checkpoints;
mod goldens;

use mesh_families as _;
