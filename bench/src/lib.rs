//! A device of stated cost, for experiments with schedules: what a batch takes is known beforehand, so that what is lost on
//! the way to it can be told. Never: real models; those are run by `mesh-runner`.

pub mod device;
