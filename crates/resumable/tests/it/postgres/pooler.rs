//! A private PgBouncer for one test, in front of a server that the test crashes: the PgBouncer of the whole run is in
//! front of a server that others need.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use crate::support::eventually;

/// PgBouncer refuses to run as root: as root we start it as nobody.
const NOBODY: u32 = 65534;

/// Ends it when the pipe on its input closes, also when we are killed.
const SERVE: &str = r#"
exec 3<&0 </dev/null
"$@" 3<&- &
pooler=$!
(read -r _ <&3; kill -TERM "$pooler") &
wait "$pooler"
"#;

#[derive(Debug)]
pub(crate) struct Pooler {
    port: u16,
    shell: Child,
    _home: tempfile::TempDir,
}

impl Pooler {
    /// Starts one in front of the server on this port, which accepts every login; `None` if PgBouncer is not installed.
    pub(crate) async fn in_front_of(server_port: u16) -> Option<Self> {
        let program = program()?;
        let home = tempfile::Builder::new().prefix("pooler-").tempdir_in("/tmp").unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let settings = home.path().join("pgbouncer.ini");
        let text = [
            "[databases]",
            &format!("* = host=127.0.0.1 port={server_port} user=postgres"),
            "[pgbouncer]",
            "listen_addr = 127.0.0.1",
            &format!("listen_port = {port}"),
            "unix_socket_dir =",
            "auth_type = any",
            "pool_mode = transaction",
            "default_pool_size = 50",
            // A server that comes back is used at once.
            "server_login_retry = 1",
            "ignore_startup_parameters = extra_float_digits",
            "",
        ];
        fs::write(&settings, text.join("\n")).unwrap();
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", SERVE, "serve"]).arg(program).arg("--quiet").arg(&settings);
        shell.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        if fs::metadata(home.path()).unwrap().uid() == 0 {
            for path in [home.path(), &settings] {
                chown(path, Some(NOBODY), None).unwrap();
            }
            shell.uid(NOBODY);
        }
        let shell = shell.spawn().unwrap();
        eventually("the pooler answers", || TcpStream::connect(("127.0.0.1", port)).is_ok()).await;
        Some(Self { port, shell, _home: home })
    }

    pub(crate) fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.port)
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        drop(self.shell.wait());
    }
}

/// From PATH, or where Debian keeps it.
fn program() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let candidates =
        std::env::split_paths(&path).chain(["/usr/sbin".into()]).map(|directory| directory.join("pgbouncer"));
    candidates.into_iter().find(|program| program.is_file())
}
