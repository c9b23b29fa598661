//! Models on their way in: of two clients that send the same one, the second waits for what the first brings.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use proto_msgs::Digest;
use tokio::sync::watch;

/// The models that somebody brings. Clones share the list.
#[derive(Clone, Debug, Default)]
pub(crate) struct Coming {
    models: Arc<Mutex<HashMap<Digest, watch::Receiver<()>>>>,
}

/// Who brings a model.
#[derive(Debug)]
pub(crate) enum Claim {
    /// Whoever asked.
    Mine(Arriving),
    /// Somebody else; ends when that has come to an end, good or bad.
    Theirs(watch::Receiver<()>),
}

/// A model that its holder brings. Dropped when it is here, or will not come.
#[derive(Debug)]
pub(crate) struct Arriving {
    coming: Coming,
    pub(crate) model: Digest,
    /// Closed when dropped.
    _done: watch::Sender<()>,
}

impl Coming {
    /// Takes it on to bring a model, unless somebody has.
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
