//! Why a broker may say nothing. Owns what is known of the connection to it, and the words for people. Never waits.

use std::sync::{
    Arc,
    atomic::{AtomicU8, Ordering},
};

use mesh_transport::Heard;

const UP: u8 = 0;
const LOST: u8 = 1;
const REFUSED: u8 = 2;

/// The connection to the broker, as it was last heard of. The driver and all who ask share it.
#[derive(Clone, Debug)]
pub(crate) struct BrokerLink {
    state: Arc<AtomicU8>,
    has_keys: bool,
}

impl BrokerLink {
    /// A connection that is up.
    pub(crate) fn up(has_keys: bool) -> Self {
        Self { state: Arc::new(AtomicU8::new(UP)), has_keys }
    }

    /// Notes a change of the connection. Returns whether the broker has begun to refuse this client.
    pub(crate) fn note(&self, heard: &Heard) -> bool {
        let state = match heard {
            Heard::Frame(_) | Heard::Connected => UP,
            Heard::Lost => LOST,
            Heard::Refused => REFUSED,
        };
        self.state.swap(state, Ordering::Relaxed) != state && state == REFUSED
    }

    /// The cause of a silence, as far as the connection tells.
    pub(crate) fn hint(&self) -> Option<&'static str> {
        match (self.state.load(Ordering::Relaxed), self.has_keys) {
            (REFUSED, _) => {
                Some("it refuses this client's key, or has another key by now: look at its --authorized-keys")
            }
            // A broker drops the messages of a key that left its list.
            (UP, true) => Some(
                "the connection stands: it may be paused, overloaded or waiting for its store, or this client's key is \
                 no longer among its --authorized-keys",
            ),
            (UP, false) => Some("the connection stands: it may be paused, overloaded or waiting for its store"),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_connection_tells_why_a_broker_may_be_silent() {
        let link = BrokerLink::up(true);
        assert!(link.hint().unwrap().contains("no longer among its --authorized-keys"));
        assert!(!link.note(&Heard::Lost));
        assert_eq!(link.hint(), None, "it may be gone");
        assert!(link.note(&Heard::Refused));
        assert!(!link.note(&Heard::Refused), "that is no news");
        assert!(link.hint().unwrap().starts_with("it refuses this client's key"));
        assert!(!link.note(&Heard::Connected));
        assert!(!BrokerLink::up(false).hint().unwrap().contains("key"), "it has none");
    }
}
