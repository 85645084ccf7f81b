//! When a model that failed may be loaded again.

use std::time::Duration;

/// Longest wait between two attempts.
pub const DELAY_MAX: Duration = Duration::from_secs(60);

/// How long after the last of `failures` failures in a row the next attempt may begin. A first failure may be retried
/// at once, since engines do crash; from then on the wait doubles from 1 s up to [`DELAY_MAX`].
pub fn delay(failures: u32) -> Duration {
    match failures {
        0 | 1 => Duration::ZERO,
        _ => Duration::from_secs(1 << (failures - 2).min(6)).min(DELAY_MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_bound() {
        let seconds: Vec<_> = (0..10).map(|failures| delay(failures).as_secs()).collect();
        assert_eq!(seconds, [0, 0, 1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(delay(u32::MAX), DELAY_MAX);
    }
}
