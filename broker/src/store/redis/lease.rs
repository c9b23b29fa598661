//! Owns the lease, a key with a short life: one broker writes one mesh's table. It is taken at the start and renewed
//! every second.
//!
//! The lease keeps two brokers from overwriting each other by mistake. Which broker a worker or client talks to is not
//! decided here.

use std::time::{Duration, Instant};

use redis::Pipeline;
use tokio::time::sleep;
use tracing::warn;

use super::{Redis, millis};
use crate::store::{Kept, StoreError};

/// Life of the lease: a killed broker's lease is free after this. Three renewals, since one may be late and one lost.
pub(super) const LEASE_TTL: Duration = Duration::from_secs(3);

/// Interval of renewals.
pub(super) const KEEP_EVERY: Duration = Duration::from_secs(1);

/// `PTTL` of a key that does not exist.
const PTTL_NO_KEY: i64 = -2;

/// `PTTL` of a key that does not expire: no broker sets its lease like this.
const PTTL_FOR_EVER: i64 = -1;

/// Interval of looks at another broker's lease.
const LOOK_EVERY: Duration = Duration::from_millis(200);

impl Redis {
    /// Takes the lease. If it is not renewed, its broker has died, and this waits until it expires.
    pub(super) async fn take_lease(&mut self) -> Result<(), StoreError> {
        let began = Instant::now();
        let mut left_ms_before = None;
        loop {
            if self.try_take().await? {
                return Ok(());
            }
            let mut look = Pipeline::new();
            look.cmd("GET").arg(self.key("broker")).cmd("PTTL").arg(self.key("broker"));
            let (holder, left_ms): (Option<String>, i64) = self.ask(&look).await?;
            // It may have expired between the two answers.
            let Some(holder) = holder.filter(|_| left_ms != PTTL_NO_KEY) else { continue };
            let is_renewed = left_ms_before.is_some_and(|before| left_ms > before) || left_ms == PTTL_FOR_EVER;
            if is_renewed || began.elapsed() > 2 * LEASE_TTL {
                return Err(self.taken(holder));
            }
            if left_ms_before.is_none() {
                warn!("waiting up to {left_ms} ms for the lease of the broker before this one ({holder}) to run out");
            }
            left_ms_before = Some(left_ms);
            sleep(LOOK_EVERY).await;
        }
    }

    async fn try_take(&mut self) -> Result<bool, StoreError> {
        let mut take = Pipeline::new();
        let command = take.cmd("SET").arg(self.key("broker")).arg(&self.settings.holder);
        command.arg("NX").arg("PX").arg(millis(LEASE_TTL));
        let asked_at = Instant::now();
        let (taken,): (Option<String>,) = self.ask(&take).await?;
        if taken.is_some() {
            self.leased_at = Some(asked_at);
        }
        Ok(taken.is_some())
    }

    /// Renews the lease, or takes it again if it expired. Another broker may take it between reading and renewing. Then its
    /// lease is prolonged, and the second look finds it.
    pub(super) async fn keep_lease(&mut self) -> Result<Kept, StoreError> {
        let mut read = Pipeline::new();
        read.cmd("GET").arg(self.key("broker"));
        let asked_at = Instant::now();
        match self.ask::<(Option<String>,)>(&read).await?.0 {
            Some(holder) if holder == self.settings.holder => {
                let mut renew = Pipeline::new();
                renew.cmd("PEXPIRE").arg(self.key("broker")).arg(millis(LEASE_TTL)).ignore();
                renew.cmd("GET").arg(self.key("broker"));
                match self.ask::<(Option<String>,)>(&renew).await?.0 {
                    Some(holder) if holder != self.settings.holder => Err(self.taken(holder)),
                    _ => {
                        self.leased_at = Some(asked_at);
                        Ok(Kept::Same)
                    }
                }
            }
            None if self.try_take().await? => Ok(Kept::Emptied),
            None => Err(self.taken("a broker that has just started".to_owned())),
            Some(holder) => Err(self.taken(holder)),
        }
    }

    /// Gives the lease back if it is this broker's.
    pub(super) async fn release_lease(&mut self) -> Result<(), StoreError> {
        if self.keep_lease().await? == Kept::Same {
            let mut delete = Pipeline::new();
            delete.cmd("DEL").arg(self.key("broker")).ignore();
            self.ask::<()>(&delete).await?;
        }
        Ok(())
    }

    fn taken(&mut self, holder: String) -> StoreError {
        self.leased_at = None;
        let (cluster, server) = (self.settings.cluster.clone(), self.settings.address.shown().to_owned());
        StoreError::Taken { cluster, server, holder }
    }
}
