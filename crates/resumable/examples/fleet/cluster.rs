//! A private PostgreSQL: created in a temporary directory, and removed when the program ends.
//!
//! Invariant: it touches nothing that it did not create. The server listens on a free port of 127.0.0.1, and ends when
//! our end of its pipe closes, even when we are killed.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a server may take to start or to stop, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// Serves until the pipe on its input closes, or the server ends by itself.
const SERVE: &str = r#"
exec 3<&0 </dev/null
"$@" 3<&- &
server=$!
(read -r _ <&3; kill -INT "$server") &
wait "$server"
"#;

/// A running server.
#[derive(Debug)]
pub(crate) struct Cluster {
    home: tempfile::TempDir,
    programs: PathBuf,
    port: u16,
    account: Option<(u32, u32)>,
    shell: Option<Child>,
}

impl Cluster {
    /// Creates a cluster and starts it.
    pub(crate) fn start() -> Result<Self, String> {
        let programs = programs().ok_or(
            "there is no PostgreSQL on this machine (`initdb` and `postgres`); install it with \
             `apt-get install postgresql`, or name a server of yours with --database postgres://…",
        )?;
        let home =
            tempfile::Builder::new().prefix("fleet-").tempdir_in(reachable()).map_err(|error| error.to_string())?;
        let account = account(home.path())?;
        let port = TcpListener::bind("127.0.0.1:0").and_then(|door| door.local_addr());
        let port = port.map_err(|error| format!("no free port: {error}"))?.port();
        let mut cluster = Self { home, programs, port, account, shell: None };
        let mut initdb = cluster.command(&cluster.programs.join("initdb"));
        initdb.args([
            "--pgdata=data",
            "--username=postgres",
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",
        ]);
        let made = initdb.output().map_err(|error| format!("initdb: {error}"))?;
        if !made.status.success() {
            return Err(format!("initdb: {}", String::from_utf8_lossy(&made.stderr)));
        }
        cluster.serve()?;
        Ok(cluster)
    }

    pub(crate) fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.port)
    }

    /// Starts the server on the existing data.
    pub(crate) fn serve(&mut self) -> Result<(), String> {
        let postgres = self.programs.join("postgres").display().to_string();
        let (port, sockets) =
            (format!("port={}", self.port), format!("unix_socket_directories={}", self.home.path().display()));
        let mut shell = self.command(Path::new("/bin/sh"));
        shell.args(["-c", SERVE, "serve", &postgres, "-D", "data", "-c", &port, "-c", &sockets]);
        shell.args(["-c", "listen_addresses=127.0.0.1", "-c", "max_connections=200"]);
        shell.stdin(Stdio::piped());
        self.shell = Some(shell.spawn().map_err(|error| format!("/bin/sh: {error}"))?);
        let status = self.home.path().join("data/postmaster.pid");
        wait_until("the server answers", || {
            // It says so in the eighth line.
            fs::read_to_string(&status).is_ok_and(|text| text.lines().nth(7).is_some_and(|line| line.trim() == "ready"))
        })
    }

    /// Ends the server as a crash does: it waits for no client and writes nothing.
    pub(crate) fn crash(&mut self) -> Result<(), String> {
        let pid =
            fs::read_to_string(self.home.path().join("data/postmaster.pid")).map_err(|error| error.to_string())?;
        let pid = pid.lines().next().unwrap_or_default().trim().to_owned();
        let killed = Command::new("kill").args(["-QUIT", &pid]).status();
        killed.map_err(|error| format!("kill: {error}"))?;
        self.ended()
    }

    fn ended(&mut self) -> Result<(), String> {
        let Some(mut shell) = self.shell.take() else { return Ok(()) };
        let ended = wait_until("the server ends", || !matches!(shell.try_wait(), Ok(None)));
        drop(shell.stdin.take());
        ended
    }

    /// A command in the server's directory, run as a user that may run a server.
    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.current_dir(self.home.path()).env("LC_ALL", "C").process_group(0);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        if let Some((uid, gid)) = self.account {
            command.uid(uid).gid(gid);
        }
        command
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(shell) = &mut self.shell {
            drop(shell.stdin.take());
        }
        // The directory is removed afterwards, however the server ended.
        drop(self.ended());
    }
}

/// The first directory that has both programs, from PATH or from where Debian keeps them, newest version first.
fn programs() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut debian: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path().join("bin"))
        .collect();
    debian.sort();
    std::env::split_paths(&path)
        .chain(debian.into_iter().rev())
        .find(|directory| ["initdb", "postgres"].iter().all(|name| directory.join(name).is_file()))
}

/// The temporary directory, or `/tmp` if other users cannot enter root's own.
fn reachable() -> PathBuf {
    let open = |up: &Path| fs::metadata(up).is_ok_and(|metadata| metadata.permissions().mode() & 0o001 != 0);
    let chosen = std::env::temp_dir();
    if chosen.ancestors().all(open) { chosen } else { PathBuf::from("/tmp") }
}

/// A database server refuses to run as root: as root, we give the directory to another user and start the server as
/// that user.
fn account(home: &Path) -> Result<Option<(u32, u32)>, String> {
    if fs::metadata(home).map_err(|error| error.to_string())?.uid() != 0 {
        return Ok(None);
    }
    let users = fs::read_to_string("/etc/passwd").map_err(|error| format!("/etc/passwd: {error}"))?;
    let named = |name: &str| {
        let fields: Vec<&str> = users.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|f| f[0] == name)?;
        Some((fields.get(2)?.parse().ok()?, fields.get(3)?.parse().ok()?))
    };
    let account = ["postgres", "nobody"].into_iter().find_map(named).ok_or("there is no user a server may run as")?;
    chown(home, Some(account.0), Some(account.1)).map_err(|error| format!("{}: {error}", home.display()))?;
    Ok(Some(account))
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) -> Result<(), String> {
    let started = Instant::now();
    while !holds() {
        if started.elapsed() > PATIENCE {
            return Err(format!("not within {PATIENCE:?}: {what}"));
        }
        std::thread::park_timeout(Duration::from_millis(10));
    }
    Ok(())
}
