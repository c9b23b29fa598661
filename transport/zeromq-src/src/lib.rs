//! Stands in for the `zeromq-src` 0.2 that `zmq-sys` 0.12 builds with, so that libzmq comes out right.
//!
//! The published pair builds libzmq 4.3.4 without CURVE and with an empty `platform.hpp`: keepalive options are
//! accepted and do nothing, file descriptors leak into child processes, timers follow the wall clock. And every libzmq
//! lets one peer fill the memory with a message that has no last part. This crate has the same interface and builds the
//! 4.3.5 that the newer `zeromq-src` carries against Debian's static libsodium, with a limit of parts (`source`).
//!
//! Owns: how libzmq is built, and that limit. Never: other source code of libzmq or libsodium.

mod source;

use std::{
    env, fs,
    path::{Path, PathBuf},
};

/// The folder of a library, as the 0.2 builder names it. Never made: the only caller passes `None`.
#[derive(Debug)]
pub enum LibLocation {}

/// What `platform.hpp` says of a hosted Linux with CURVE. ZeroMQ over WebSocket and other transports are left out.
const PLATFORM: &[&str] = &[
    "HAVE_ACCEPT4",
    "HAVE_CLOCK_GETTIME",
    "HAVE_STRNLEN",
    "ZMQ_HAVE_CURVE",
    "ZMQ_HAVE_EVENTFD",
    "ZMQ_HAVE_EVENTFD_CLOEXEC",
    "ZMQ_HAVE_IFADDRS",
    "ZMQ_HAVE_IPC",
    "ZMQ_HAVE_LINUX",
    "ZMQ_HAVE_O_CLOEXEC",
    "ZMQ_HAVE_SOCK_CLOEXEC",
    "ZMQ_HAVE_SO_KEEPALIVE",
    "ZMQ_HAVE_STRUCT_SOCKADDR_UN",
    "ZMQ_HAVE_TCP_KEEPCNT",
    "ZMQ_HAVE_TCP_KEEPIDLE",
    "ZMQ_HAVE_TCP_KEEPINTVL",
    "ZMQ_HAVE_UIO",
    "ZMQ_IOTHREAD_POLLER_USE_EPOLL",
    "ZMQ_POLL_BASED_ON_POLL",
    "ZMQ_STATIC",
    "ZMQ_USE_CV_IMPL_STL11",
    "ZMQ_USE_LIBSODIUM",
];

/// C libraries that have `strlcpy`, which libzmq would define once more: glibc since 2.38, and musl. Two conditions, as
/// musl's preprocessor cannot read the one that only glibc defines.
const STRLCPY: &str = "\
#include <features.h>
#ifndef __GLIBC__
#define ZMQ_HAVE_STRLCPY 1
#elif __GLIBC_PREREQ (2, 38)
#define ZMQ_HAVE_STRLCPY 1
#endif
";

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
        assert!(target.contains("linux"), "libzmq is set up for Linux here, not for {target}");
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
        let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
        let zeromq = source::limited_copy(&out.join("libzmq"));
        let defines: String = PLATFORM.iter().map(|name| format!("#define {name} 1\n")).collect();
        fs::write(zeromq.join("src/platform.hpp"), defines + STRLCPY).expect("OUT_DIR can be written");
        cc::Build::new()
            .cpp(true)
            .std("c++11")
            .warnings(false)
            .include(zeromq.join("include"))
            .include(only_sodium(&headers, &out.join("sodium-include")))
            .files(source::compiled(&zeromq))
            .compile("zmq");
        println!("cargo:rustc-link-search=native={}", library.display());
        println!("cargo:rustc-link-lib=static=sodium");
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

/// Copies sodium's headers alone: the whole of `/usr/include` on the search path breaks cross builds.
fn only_sodium(headers: &Path, to: &Path) -> PathBuf {
    let copied = fs::create_dir_all(to)
        .and_then(|()| fs::copy(headers.join("sodium.h"), to.join("sodium.h")))
        .and_then(|_| source::copy_folder(&headers.join("sodium"), &to.join("sodium")));
    copied.unwrap_or_else(|error| panic!("copying libsodium's headers from {}: {error}", headers.display()));
    to.to_owned()
}
