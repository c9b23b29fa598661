# A Podman of the tests' own: its storage, its service and its containers are in one temporary folder, and nothing of it is
# shared with a Podman of this machine. Sourced by ./test, from the root of the repository.

podman_home=
podman_pid=

# Starts it, with the runner's image, and sets $podman_socket; else $podman_lacks says what is missing here.
start_podman() {
    podman_lacks=
    # Podman runs without root, too, but then needs more of the machine than these tests should ask for.
    if [ "$(id -u)" != 0 ]; then podman_lacks="the tests start their own Podman only as root"; return 1; fi
    if ! command -v podman >/dev/null; then podman_lacks="there is no podman command"; return 1; fi
    podman_home=$(mktemp -d)
    podman_socket=unix://$podman_home/podman.sock
    configure_podman
    # In its own folder: the monitors of containers leave files where Podman was started.
    (cd "$podman_home" && own_podman exec podman system service --time=0 "$podman_socket" >"$podman_home/log" 2>&1) &
    podman_pid=$!
    local _
    for _ in {1..100}; do
        if podman --remote --url "$podman_socket" version >/dev/null 2>&1; then
            own_podman docker/build-image --engine podman && return
            podman_lacks="podman could not build the runner's image"
            return 1
        fi
        kill -0 "$podman_pid" 2>/dev/null || break
        sleep 0.1
    done
    podman_lacks="podman does not start: $(tail -n 3 "$podman_home/log")"
    return 1
}

configure_podman() {
    # Debian's first choice; but crun refuses machines with control groups of both versions.
    local runtime=crun
    if [ -d /sys/fs/cgroup/unified ] || ! command -v crun >/dev/null; then runtime=runc; fi
    cat >"$podman_home/storage.conf" <<CONF
[storage]
driver = "overlay"
graphroot = "$podman_home/store"
runroot = "$podman_home/run"
CONF
    # Locks and temporary files would else be those of the machine's Podman. Neither systemd nor its journal is needed.
    cat >"$podman_home/containers.conf" <<CONF
[engine]
runtime = "$runtime"
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
tmp_dir = "$podman_home/tmp"
CONF
}

own_podman() { # COMMAND...
    CONTAINERS_STORAGE_CONF=$podman_home/storage.conf CONTAINERS_CONF=$podman_home/containers.conf "$@"
}

# Ends it and removes all of it.
stop_podman() {
    [ -n "$podman_home" ] || return 0
    if [ -n "$podman_pid" ]; then
        own_podman podman rm --all --force --time 0 >/dev/null 2>&1 || true
        kill "$podman_pid" 2>/dev/null || true
        wait "$podman_pid" 2>/dev/null || true
    fi
    # Podman mounts the folder of its layers onto itself.
    umount "$podman_home/store/overlay" 2>/dev/null || true
    rm -rf --one-file-system "$podman_home"
    podman_home=
}
