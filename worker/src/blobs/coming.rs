//! Models under way: if two clients would send the same one, the second attempt waits for the first one's copy.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use proto_msgs::Digest;
use tokio::sync::watch;

/// The models that an attempt receives at present. Clones share the list.
#[derive(Clone, Debug, Default)]
pub(crate) struct Coming {
    models: Arc<Mutex<HashMap<Digest, watch::Receiver<()>>>>,
}

/// The attempt that receives a model: the one that asks, or another.
#[derive(Debug)]
pub(crate) enum Claim {
    /// The attempt that asked.
    Mine(Arriving),
    /// Another attempt; the channel closes when its transfer has ended, good or bad.
    Theirs(watch::Receiver<()>),
}

/// The right to receive a model. Dropped when the model has arrived or will not come.
#[derive(Debug)]
pub(crate) struct Arriving {
    coming: Coming,
    pub(crate) model: Digest,
    /// Closes the channel of those that wait.
    _done: watch::Sender<()>,
}

impl Coming {
    /// Claims a model for the caller, unless another attempt receives it.
    pub(crate) fn claim(&self, model: Digest) -> Claim {
        let mut models = self.models();
        if let Some(theirs) = models.get(&model) {
            return Claim::Theirs(theirs.clone());
        }
        let (done, waiting) = watch::channel(());
        models.insert(model, waiting);
        Claim::Mine(Arriving { coming: self.clone(), model, _done: done })
    }

    fn models(&self) -> MutexGuard<'_, HashMap<Digest, watch::Receiver<()>>> {
        self.models.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        self.coming.models().remove(&self.model);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_second_waits_until_the_first_has_come_to_an_end() {
        let (coming, model) = (Coming::default(), Digest::of(b"model"));
        let Claim::Mine(mine) = coming.claim(model) else { panic!("nobody else brings it") };
        let Claim::Theirs(mut theirs) = coming.claim(model) else { panic!("somebody brings it") };
        assert!(matches!(coming.claim(Digest::of(b"another")), Claim::Mine(_)));
        drop(mine);
        assert!(theirs.changed().await.is_err(), "over");
        assert!(matches!(coming.claim(model), Claim::Mine(_)), "the next may try");
    }
}
