//! The server over real connections, with a scripted engine behind it.

mod answers;
mod bounds;
mod fake;
mod lifecycle;
mod messages;
mod refusals;
mod several;
mod surfaces;

use mesh_dialects as _;
