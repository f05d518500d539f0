//! A private server for the tests: it starts in its own directory, and is gone with it whatever happens to us.
//!
//! Invariant: the server is the child of a small shell that holds the other end of our pipe. The pipe closes when we
//! let go of it, panic, are interrupted or are killed with SIGKILL, and then the shell stops the server by its own pid
//! and removes the directory. No handler of ours has to run for that.

use std::fs::{self, DirBuilder};
use std::net::TcpListener;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::command::{quoted, wait_until};

/// How long a server may take to be set up and to answer: seconds, on a machine with nothing else to do.
const START_BOUND: Duration = Duration::from_secs(300);

/// A file system in memory, on Linux.
const MEMORY: &str = "/dev/shm";

/// How much room there must be for a server in memory. It uses a quarter of that.
const ROOM_KIB: u64 = 1 << 20;

/// How often to try another port if a process takes the free one before the server does.
pub(crate) const PORT_ATTEMPTS: usize = 3;

/// How long a shell may take to stop its server; its own bound for that is 10 s.
const STOP_BOUND: Duration = Duration::from_secs(20);

/// The script of a server's shell. `$1` is the directory, `$2` sets it up, `$3` serves, `$4` is the signal that stops.
const KEEP_SERVER: &str = r#"
exec 3<&0 </dev/null >>log 2>&1
if eval "$2"; then
    eval "exec $3" 3<&- &
    server=$!
    (
        read -r _ <&3
        [ -e ended ] || kill -s "$4" "$server"
        tries=0
        while [ ! -e ended ] && [ "$tries" -lt 100 ]; do sleep 0.1; tries=$((tries + 1)); done
        [ -e ended ] || kill -s KILL "$server"
    ) &
    wait "$server"
fi
echo "$?" >ended
read -r _ <&3
wait
cd / && rm -rf "$1"
"#;

/// A shell that cleans up when our end of its pipe closes.
pub(crate) struct Keeper {
    shell: Child,
    lifeline: Option<ChildStdin>,
}

impl Keeper {
    /// Starts `sh -c script` in its own process group, which a Ctrl-C on this terminal does not reach. Secrets go
    /// through the environment, because other users can see the arguments.
    pub(crate) fn hold(
        script: &str,
        arguments: &[&str],
        secret: Option<(&str, &str)>,
        directory: &Path,
        account: Option<Account>,
    ) -> Result<Self, String> {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script, "keeper"]).args(arguments).current_dir(directory).process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).env("LC_ALL", "C");
        command.envs(secret);
        if let Some(account) = account {
            command.uid(account.uid).gid(account.gid);
        }
        let mut shell = command.spawn().map_err(|error| format!("/bin/sh could not be started: {error}"))?;
        let lifeline = shell.stdin.take();
        Ok(Self { shell, lifeline })
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        drop(self.lifeline.take());
        // The next run must not meet this one, so we wait for its end; it also has to be reaped.
        if !wait_until(STOP_BOUND, || !matches!(self.shell.try_wait(), Ok(None))) {
            eprintln!("the keeper of a test server (pid {}) has not ended in {STOP_BOUND:?}", self.shell.id());
        }
    }
}

/// The user that a server runs as when we are root: database servers refuse root.
#[derive(Clone, Copy)]
pub(crate) struct Account {
    uid: u32,
    gid: u32,
}

impl Account {
    fn unprivileged() -> Result<Self, String> {
        let users = fs::read_to_string("/etc/passwd").map_err(|error| format!("/etc/passwd: {error}"))?;
        ["postgres", "nobody"].into_iter().find_map(|name| Self::named(&users, name)).ok_or_else(|| {
            "a database server does not run as root, and there is neither a user `postgres` nor `nobody`: \
             run cargo xtask as another user"
                .to_owned()
        })
    }

    fn named(users: &str, name: &str) -> Option<Self> {
        let fields: Vec<_> = users.lines().map(|line| line.split(':').collect()).find(|f: &Vec<_>| f[0] == name)?;
        Some(Self { uid: fields.get(2)?.parse().ok()?, gid: fields.get(3)?.parse().ok()? })
    }
}

/// The directory of one server, and the account that owns it.
pub(crate) struct Home {
    pub(crate) path: PathBuf,
    account: Option<Account>,
}

impl Home {
    /// Creates a directory that other users cannot read, owned by an unprivileged user.
    pub(crate) fn create(name: &str) -> Result<Self, String> {
        Self::create_in(&std::env::temp_dir(), name)
    }

    /// Works like `create`, but in memory if there is room for it: a server waits for the disk whenever it creates or
    /// removes a table, whatever its settings.
    pub(crate) fn create_in_memory(name: &str) -> Result<Self, String> {
        let memory = Path::new(MEMORY);
        match free_kib(memory) {
            Some(ROOM_KIB..) => Self::create_in(memory, name).or_else(|_| Self::create(name)),
            _ => Self::create(name),
        }
    }

    fn create_in(place: &Path, name: &str) -> Result<Self, String> {
        let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.subsec_nanos());
        let unique = format!("cancel-safe-{name}-{}-{nanos}", std::process::id());
        let broken = |error: std::io::Error| format!("no directory for {name} could be made: {error}");
        let mut path = place.join(&unique);
        DirBuilder::new().mode(0o700).create(&path).map_err(broken)?;
        if fs::metadata(&path).map_err(broken)?.uid() != 0 {
            return Ok(Self { path, account: None });
        }
        let account = Account::unprivileged()?;
        if !reachable_by_all(&path) {
            // Root's TMPDIR may be where other users have no access.
            fs::remove_dir(&path).map_err(broken)?;
            path = Path::new("/tmp").join(unique);
            DirBuilder::new().mode(0o700).create(&path).map_err(broken)?;
        }
        chown(&path, Some(account.uid), Some(account.gid)).map_err(broken)?;
        Ok(Self { path, account: Some(account) })
    }
}

/// The free room at a place, if the place exists.
fn free_kib(place: &Path) -> Option<u64> {
    let output = Command::new("df").arg("-Pk").arg(place).env("LC_ALL", "C").output().ok()?;
    let said = String::from_utf8(output.stdout).ok()?;
    said.lines().nth(1)?.split_whitespace().nth(3)?.parse().ok()
}

fn reachable_by_all(path: &Path) -> bool {
    let open = |up: &Path| fs::metadata(up).is_ok_and(|metadata| metadata.permissions().mode() & 0o001 != 0);
    path.ancestors().skip(1).all(open)
}

/// How a server is set up, run and stopped.
pub(crate) struct Recipe<'a> {
    pub(crate) name: &'a str,
    pub(crate) set_up: &'a [&'a str],
    pub(crate) serve: &'a [&'a str],
    pub(crate) stop_signal: &'a str,
}

/// A running server.
pub(crate) struct PrivateServer {
    _keeper: Keeper,
}

impl PrivateServer {
    /// Starts a server in `home` and waits until `ready` says that it answers.
    pub(crate) fn start(home: Home, recipe: &Recipe<'_>, ready: impl Fn(&Path) -> bool) -> Result<Self, String> {
        let words = |command: &[&str]| command.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ");
        let (set_up, serve) = (words(recipe.set_up), words(recipe.serve));
        let directory = home.path.to_string_lossy();
        // Its log exists before the shell starts, so that there is something to show however early the server fails.
        let log = home.path.join("log");
        let arguments = [&*directory, &set_up, &serve, recipe.stop_signal];
        let keeper = Keeper::hold(KEEP_SERVER, &arguments, None, &home.path, home.account)?;
        let ended = home.path.join("ended");
        let answered = wait_until(START_BOUND, || ended.exists() || ready(&home.path));
        if answered && !ended.exists() {
            return Ok(Self { _keeper: keeper });
        }
        let how = if answered { "ended at once".to_owned() } else { format!("did not answer within {START_BOUND:?}") };
        let said = fs::read_to_string(log).unwrap_or_default();
        Err(format!("the private {} server {how}; it said:\n{said}", recipe.name))
    }
}

/// A port of 127.0.0.1 that was free just now.
pub(crate) fn free_port() -> Result<u16, String> {
    TcpListener::bind(("127.0.0.1", 0))
        .and_then(|listener| listener.local_addr())
        .map(|address| address.port())
        .map_err(|error| format!("no free port of 127.0.0.1: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A "server" that is ready when it has written a file, and stays until it is stopped.
    fn start(serve: &[&str]) -> (PathBuf, Result<PrivateServer, String>) {
        let home = Home::create("keeper-test").unwrap();
        let path = home.path.clone();
        let recipe = Recipe { name: "test", set_up: &["touch", "data"], serve, stop_signal: "TERM" };
        let written = |path: &Path| fs::read_to_string(path.join("pid")).is_ok_and(|pid| pid.ends_with('\n'));
        (path, PrivateServer::start(home, &recipe, written))
    }

    #[test]
    fn a_dropped_server_is_gone_with_its_directory() {
        let (path, server) = start(&["/bin/sh", "-c", "echo $$ >pid; exec sleep 600"]);
        let server = server.unwrap();
        assert!(path.join("data").exists());
        let pid = fs::read_to_string(path.join("pid")).unwrap();
        assert!(alive(&pid));
        drop(server);
        assert!(!alive(&pid));
        assert!(!path.exists());
    }

    #[test]
    fn a_server_that_ends_by_itself_is_told_with_its_last_words() {
        let (path, server) = start(&["/bin/sh", "-c", "echo the disk is on fire; exit 3"]);
        assert!(server.err().unwrap().contains("the disk is on fire"));
        assert!(!path.exists());
    }

    #[test]
    fn room_is_known_where_there_is_a_place() {
        assert!(free_kib(&std::env::temp_dir()).is_some());
        assert_eq!(free_kib(Path::new("/no/such/place")), None);
    }

    #[test]
    fn accounts_are_read_by_name() {
        let users = "root:x:0:0::/root:/bin/sh\nnobody:x:65534:65533::/:/bin/false\nbroken\n";
        let account = Account::named(users, "nobody").unwrap();
        assert_eq!((account.uid, account.gid), (65534, 65533));
        assert!(Account::named(users, "postgres").is_none());
    }

    fn alive(pid: &str) -> bool {
        Command::new("sh")
            .args(["-c", &format!("kill -0 {}", pid.trim())])
            .stderr(Stdio::null())
            .status()
            .unwrap()
            .success()
    }
}
