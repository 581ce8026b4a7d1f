//! Repeats a read while the slot that it concerns changes hands.

use std::time::Duration;

/// How often a read is tried.
const ATTEMPTS: u32 = 8;

/// The pause before the second attempt; the pause before the third is twice as long, and so on.
const PAUSE: Duration = Duration::from_millis(5);

/// The attempts of one read: `while retry.next().await { … }`.
#[derive(Default)]
pub struct OwnerRetry {
    begun: u32,
}

impl OwnerRetry {
    /// Waits until the next attempt may begin, which is at once for the first; `false` if there
    /// were enough.
    pub async fn next(&mut self) -> bool {
        if self.begun == ATTEMPTS {
            return false;
        }
        if self.begun > 0 {
            tokio::time::sleep(PAUSE * self.begun).await;
        }
        self.begun += 1;
        true
    }

    /// Whether an attempt has failed already.
    #[must_use]
    pub fn is_repeat(&self) -> bool {
        self.begun > 1
    }

    /// Whether no other attempt follows this one.
    #[must_use]
    pub fn is_last(&self) -> bool {
        self.begun == ATTEMPTS
    }
}
