//! How often nodes speak: seldom enough for a large mesh, often enough for a small one.

use std::time::Duration;

/// The shortest time between two adverts of a node that has nothing new to say.
const HEARTBEAT_MIN: Duration = Duration::from_millis(1500);

/// What each member adds to that: every node hears every heartbeat, so a mesh of any size has at most 20 a second.
const HEARTBEAT_PER_MEMBER: Duration = Duration::from_millis(50);

/// The longest. A mesh for which this is too short has outgrown being told of everybody.
pub const HEARTBEAT_MAX: Duration = Duration::from_secs(100);

/// Heartbeats that may get lost.
const HEARTBEATS_A_LEASE: u32 = 3;

/// The shortest lease.
pub const LEASE_MIN: Duration = Duration::from_secs(5);

/// The longest one.
pub const LEASE_MAX: Duration = Duration::from_secs(300);

/// Time between two pulses over a connection that is not used.
pub const PULSE_IDLE: Duration = Duration::from_secs(1);

/// Time between two pulses over a connection that was used in the last [`USED`], and between neighbours.
pub const PULSE_USED: Duration = Duration::from_millis(250);

/// What each connection adds to that: a node that everybody asks sends at most 200 pulses a second.
const PULSE_PER_CONNECTION: Duration = Duration::from_millis(5);

/// For so long a connection counts as used.
pub const USED: Duration = Duration::from_secs(30);

/// The longest time to the next pulse that a node may announce.
pub const PULSE_MAX: Duration = Duration::from_secs(10);

/// After so many pulses that did not come, a connection counts as lost.
pub const PULSES_MISSED_MAX: u32 = 3;

/// Time between two adverts of a node that has nothing new to say, in a mesh of so many.
pub fn heartbeat(members: usize) -> Duration {
    let members = u32::try_from(members).unwrap_or(u32::MAX);
    HEARTBEAT_PER_MEMBER.saturating_mul(members).clamp(HEARTBEAT_MIN, HEARTBEAT_MAX)
}

/// For how long an advert holds, in a mesh of so many.
pub fn lease(members: usize) -> Duration {
    (heartbeat(members) * HEARTBEATS_A_LEASE).clamp(LEASE_MIN, LEASE_MAX)
}

/// Time to the next pulse over a connection that was used so long ago, for a node that has so many connections.
pub fn pulse(unused: Duration, connections: usize) -> Duration {
    let least = if unused < USED { PULSE_USED } else { PULSE_IDLE };
    let connections = u32::try_from(connections).unwrap_or(u32::MAX);
    PULSE_PER_CONNECTION.saturating_mul(connections).clamp(least, PULSE_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_nodes_speak_often_and_many_seldom() {
        assert_eq!((heartbeat(0), lease(0)), (HEARTBEAT_MIN, LEASE_MIN));
        assert_eq!((heartbeat(30), lease(30)), (HEARTBEAT_MIN, LEASE_MIN));
        assert_eq!((heartbeat(1000), lease(1000)), (Duration::from_secs(50), Duration::from_secs(150)));
        assert_eq!((heartbeat(usize::MAX), lease(usize::MAX)), (HEARTBEAT_MAX, LEASE_MAX));
        for members in [1, 10, 100, 1000, 2000] {
            assert!(members as f64 / heartbeat(members).as_secs_f64() <= 20.0 + 1e-9);
            assert!(lease(members) >= heartbeat(members) * 2);
        }
    }

    #[test]
    fn who_is_asked_by_many_pulses_slower() {
        assert_eq!(pulse(Duration::ZERO, 1), PULSE_USED);
        assert_eq!(pulse(USED, 1), PULSE_IDLE);
        assert_eq!(pulse(Duration::ZERO, 100), Duration::from_millis(500));
        assert_eq!(pulse(USED, usize::MAX), PULSE_MAX);
    }
}
