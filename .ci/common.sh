# What ./demo and ./test share; sourced by both, from the root of the repository.

say() { printf '\n== %s\n' "$*"; }

fail() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

# Debian packages that are not installed yet, and nothing else. Needs root or sudo only if there are some.
need_packages() {
    local missing=() package
    for package in "$@"; do
        [ "$(dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] ||
            missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    local as_root=()
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || fail "as root, run: apt-get install ${missing[*]}"
        as_root=(sudo)
    fi
    say "installing ${missing[*]}"
    "${as_root[@]}" apt-get update -q
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}"
}

# What every build needs: a C++ compiler for libzmq, libsodium for its encryption, pip to fetch the runtimes' wheels.
need_build_tools() {
    local needed have
    needed=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
    command -v cargo >/dev/null || fail "cargo is missing: install Rust $needed or newer (https://rustup.rs)"
    have=$(cargo --version | cut -d ' ' -f 2)
    [ "$(printf '%s\n' "$needed" "$have" | sort -V | head -n 1)" = "$needed" ] ||
        fail "cargo $have is too old: install Rust $needed or newer (https://rustup.rs; Debian's own is older)"
    need_packages gcc g++ make pkg-config libsodium-dev unzip
    # Whichever python3 comes first in PATH is the one that fetches; only Debian's own can be completed here.
    python3 -m pip --version >/dev/null 2>&1 || need_packages python3 python3-pip
}
