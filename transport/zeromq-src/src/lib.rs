//! Stands in for the `zeromq-src` 0.2 that `zmq-sys` 0.12 builds with, so that libzmq comes out right.
//!
//! The published pair builds libzmq 4.3.4 without CURVE and with an empty `platform.hpp`: keepalive options are
//! accepted and do nothing, file descriptors leak into child processes, timers follow the wall clock. This crate has the
//! same interface and builds the vendored 4.3.5 of the newer `zeromq-src` against Debian's static libsodium.
//!
//! Owns: build flags. Never: source code of libzmq or libsodium.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

pub use upstream::LibLocation;

/// What a hosted Linux has and the vendored build forgets to say.
const LINUX_DEFINES: &[&str] = &[
    "ZMQ_HAVE_SO_KEEPALIVE",
    "ZMQ_HAVE_TCP_KEEPCNT",
    "ZMQ_HAVE_TCP_KEEPIDLE",
    "ZMQ_HAVE_TCP_KEEPINTVL",
    "ZMQ_HAVE_SOCK_CLOEXEC",
    "ZMQ_HAVE_O_CLOEXEC",
    "ZMQ_HAVE_EVENTFD",
    "ZMQ_HAVE_EVENTFD_CLOEXEC",
    "HAVE_CLOCK_GETTIME",
    "ZMQ_HAVE_IFADDRS",
];

/// The part of the 0.2 builder that `zmq-sys` calls.
#[derive(Debug, Default)]
pub struct Build;

impl Build {
    /// A builder; everything else is decided in [`Build::build`].
    pub fn new() -> Self {
        Self
    }

    /// Kept for the caller's sake: `zmq-sys` asks for no libsodium here and gets one all the same.
    pub fn with_libsodium(&mut self, _declined: Option<LibLocation>) -> &mut Self {
        self
    }

    /// Compiles libzmq with CURVE and tells cargo how to link it.
    pub fn build(&mut self) {
        let target = env::var("TARGET").expect("cargo sets TARGET for build scripts");
        let arch = target.split('-').next().unwrap_or_default();
        let library = folder("SODIUM_LIB_DIR", &target, format!("/usr/lib/{arch}-linux-gnu"));
        let headers = folder("SODIUM_INCLUDE_DIR", &target, "/usr/include".into());
        assert!(
            library.join("libsodium.a").exists() && headers.join("sodium.h").exists(),
            "libzmq needs libsodium.a and sodium.h for CURVE: `apt-get install libsodium-dev`, or point SODIUM_LIB_DIR \
             and SODIUM_INCLUDE_DIR at them (looked in {} and {})",
            library.display(),
            headers.display(),
        );
        if target.contains("linux") {
            add_defines(&target);
        }
        let sodium = LibLocation::new(library, only_sodium(&headers));
        upstream::Build::new().with_libsodium(Some(sodium)).build();
    }
}

/// The folder named by `VARIABLE_<target>` or `VARIABLE`, else `default`.
fn folder(variable: &str, target: &str, default: String) -> PathBuf {
    let per_target = format!("{variable}_{}", target.replace('-', "_"));
    for name in [&per_target, variable] {
        println!("cargo:rerun-if-env-changed={name}");
        if let Some(path) = env::var_os(name) {
            return path.into();
        }
    }
    default.into()
}

fn add_defines(target: &str) {
    let name = format!("CXXFLAGS_{}", target.replace('-', "_"));
    let mut flags = env::var(&name).or_else(|_| env::var("CXXFLAGS")).unwrap_or_default();
    for define in LINUX_DEFINES {
        flags += &format!(" -D{define}=1");
    }
    // SAFETY: a build script has one thread.
    unsafe { env::set_var(name, flags) };
}

/// A folder with sodium's headers alone: the whole of `/usr/include` on the search path breaks cross builds.
fn only_sodium(headers: &Path) -> PathBuf {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("sodium-include");
    let copy_all = || -> std::io::Result<()> {
        fs::create_dir_all(out.join("sodium"))?;
        fs::copy(headers.join("sodium.h"), out.join("sodium.h"))?;
        for entry in fs::read_dir(headers.join("sodium"))? {
            let entry = entry?;
            fs::copy(entry.path(), out.join("sodium").join(entry.file_name()))?;
        }
        Ok(())
    };
    copy_all().unwrap_or_else(|error| panic!("copying libsodium's headers from {}: {error}", headers.display()));
    out
}
