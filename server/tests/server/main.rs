//! The server over real connections, with a scripted engine behind it.

mod answers;
mod bounds;
mod elsewhere;
mod fake;
mod fake_mesh;
mod fuzz;
mod lifecycle;
mod likelihood;
mod messages;
mod parameters;
mod refusals;
mod responses;
mod several;
mod structure;
mod surfaces;

use mesh_dialects as _;
