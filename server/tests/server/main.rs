//! The server over real connections, with a scripted engine behind it.

mod answers;
mod bounds;
mod fake;
mod lifecycle;
mod likelihood;
mod parameters;
mod refusals;
mod several;
mod structure;

use mesh_dialects as _;
