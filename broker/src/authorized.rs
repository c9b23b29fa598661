//! Owns the list of keys that may connect, and when its file is read again.

use std::time::Duration;

use mesh_transport::{Admitted, keys::AuthorizedKeys};
use tokio::time::sleep;
use tracing::{info, warn};

/// Interval of looks at the file. A person who has just edited it waits no longer than this; one `stat` costs
/// microseconds.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The keys in the file, now and after each change of it. If the file can no longer be read, the keys stay.
pub(crate) fn follow(mut file: AuthorizedKeys) -> Admitted {
    let admitted = Admitted::default();
    admitted.replace(file.keys().clone());
    let shared = admitted.clone();
    tokio::spawn(async move {
        let mut complaint = None;
        loop {
            sleep(LOOK_EVERY).await;
            match file.reload_if_changed() {
                Ok(false) => {}
                Ok(true) => {
                    info!("{} keys are authorized now", file.keys().len());
                    shared.replace(file.keys().clone());
                    complaint = None;
                }
                Err(error) => {
                    let error = error.to_string();
                    if complaint.as_ref() != Some(&error) {
                        warn!("--authorized-keys: {error}; the keys read before stay in force");
                        complaint = Some(error);
                    }
                }
            }
        }
    });
    admitted
}
