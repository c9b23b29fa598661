//! A device of stated cost, for experiments with schedules: the time of each batch is known beforehand, so that losses
//! on the way to it can be measured. Never: real models; `mesh-runner` runs those.

pub mod device;
