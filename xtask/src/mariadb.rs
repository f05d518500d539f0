//! The MariaDB of the tests: a private server, or a private database in a server that the user names.
//!
//! Invariant: nothing that belongs to others is touched. On a named server only a database made for this run is used,
//! and an unavailable server is an error with the command that fixes it.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use url::Url;

use crate::missing::{Missing, find};
use crate::server::{Home, Keeper, PORT_ATTEMPTS, PrivateServer, Recipe, free_port};

/// The parts of `mariadb-server` without the service, which would be started for the whole system. On Debian a program
/// that the setup needs is in the package of the client.
const MISSING: Missing = Missing {
    name: "MariaDB",
    debian: "mariadb-server-core mariadb-client-core",
    fedora: "mariadb-server",
    arch: "mariadb",
    alpine: "mariadb mariadb-client",
    homebrew: "mariadb",
};

/// The MariaDB of a run, and how to end it.
pub(crate) struct MariaDb {
    url: String,
    _hold: Hold,
}

/// Owns what must be removed after the tests.
enum Hold {
    Server { _server: PrivateServer },
    Database { _keeper: Keeper },
}

impl MariaDb {
    /// The variable that names the server for the tests. A user sets it to use another MySQL or MariaDB server.
    pub(crate) const VARIABLE: &str = "CANCEL_SAFE_TEST_MYSQL_URL";

    /// A database in the server that the user named, or else a private server.
    pub(crate) fn for_tests() -> Result<Self, String> {
        match env::var(Self::VARIABLE) {
            Ok(url) => Self::database(&url),
            Err(_) => Self::server(&Programs::find_or_install()?),
        }
    }

    /// What has to be installed first.
    pub(crate) fn missing() -> Option<Missing> {
        let found = if env::var_os(Self::VARIABLE).is_some() { client().is_some() } else { Programs::find().is_some() };
        (!found).then_some(MISSING)
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    fn server(programs: &Programs) -> Result<Self, String> {
        let mut attempt = 1;
        loop {
            let port = free_port()?;
            match start(programs, port) {
                Ok(server) => {
                    // The setup creates a database of this name.
                    let url = format!("mysql://root@127.0.0.1:{port}/test");
                    println!("MariaDB of these tests: {url} ({})", programs.server.display());
                    return Ok(Self { url, _hold: Hold::Server { _server: server } });
                }
                Err(error) if error.contains("Address already in use") && attempt < PORT_ATTEMPTS => attempt += 1,
                Err(error) => return Err(error),
            }
        }
    }

    fn database(url: &str) -> Result<Self, String> {
        let client =
            client().ok_or("a server of yours is entered with the program `mariadb` or `mysql`: install it")?;
        // The URL may hold a password, so the variable is named instead.
        let named = |what: &str| format!("{what} in the server of {}", Self::VARIABLE);
        let mut url = Url::parse(url).map_err(|error| format!("{}: {error}", Self::VARIABLE))?;
        let database = format!("cancel_safe_test_{}", std::process::id());
        let login = Login::of(&url);
        let create = format!("DROP DATABASE IF EXISTS {database}; CREATE DATABASE {database}");
        let output = Command::new(&client)
            .args(login.arguments())
            .args(["--execute", &create])
            .env("MYSQL_PWD", &login.password)
            .output()
            .map_err(|error| format!("{} could not be started: {error}", client.display()))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(format!("{}: {said}", named("no database could be made")));
        }
        let script = r#"read -r _; exec "$@""#;
        let (program, remove) = (client.to_string_lossy(), format!("DROP DATABASE {database}"));
        let arguments = login.arguments();
        let mut words = vec![&*program];
        words.extend(arguments.iter().map(String::as_str).chain(["--execute", &remove]));
        let keeper = Keeper::hold(script, &words, Some(("MYSQL_PWD", &login.password)), Path::new("/"), None)?;
        println!("MySQL of these tests: {}", named(&format!("the database {database}")));
        url.set_path(&database);
        Ok(Self { url: url.into(), _hold: Hold::Database { _keeper: keeper } })
    }
}

/// The client program for a user's server.
fn client() -> Option<PathBuf> {
    find("mariadb").or_else(|| find("mysql"))
}

/// The server and the user in a URL.
struct Login {
    host: String,
    port: u16,
    user: String,
    password: String,
}

impl Login {
    fn of(url: &Url) -> Self {
        Self {
            host: url.host_str().unwrap_or("localhost").to_owned(),
            port: url.port().unwrap_or(3306),
            user: decoded(url.username()),
            password: decoded(url.password().unwrap_or_default()),
        }
    }

    fn arguments(&self) -> Vec<String> {
        let Self { host, port, user, .. } = self;
        vec!["--no-defaults".into(), format!("--host={host}"), format!("--port={port}"), format!("--user={user}")]
    }
}

/// Decodes a part of a URL, in which each `%` introduces a byte in hexadecimal digits.
pub(crate) fn decoded(part: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = part.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let code = after.get(..2).and_then(|digits| u8::from_str_radix(str::from_utf8(digits).ok()?, 16).ok());
        match code.filter(|_| first == b'%') {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            None => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn start(programs: &Programs, port: u16) -> Result<PrivateServer, String> {
    let home = Home::create_in_memory("mariadb")?;
    let inside = |name: &str| home.path.join(name).display().to_string();
    let (set_up, server) = (programs.set_up.to_string_lossy(), programs.server.to_string_lossy());
    // A relative path would be resolved against the directory of the programs.
    let data = format!("--datadir={}", inside("data"));
    let (port, socket) = (format!("--port={port}"), format!("--socket={}", inside("socket")));
    let pid_file = format!("--pid-file={}", inside("pid"));
    // A starting server removes the temporary tables of all other servers from a shared directory.
    let temporary = format!("--tmpdir={}", home.path.display());
    let recipe = Recipe {
        name: "MariaDB",
        set_up: &[&set_up, "--no-defaults", &data, &temporary, "--auth-root-authentication-method=normal"],
        serve: &[
            &server,
            "--no-defaults",
            &data,
            &temporary,
            &port,
            &socket,
            &pid_file,
            "--bind-address=127.0.0.1",
            "--skip-name-resolve",
            // Tests fill several pools at a time on purpose, and the campaigns fill one of a thousand connections.
            "--max-connections=1200",
            // No test cuts the power of this server, and a killed server loses nothing that it has passed to the
            // kernel.
            "--innodb-flush-log-at-trx-commit=2",
        ],
        stop_signal: "TERM",
    };
    PrivateServer::start(home, &recipe, is_ready)
}

/// The server says so in its log, which is its output.
fn is_ready(home: &Path) -> bool {
    let log = fs::read(home.join("log")).unwrap_or_default();
    String::from_utf8_lossy(&log).contains("ready for connections")
}

/// Where the programs are.
struct Programs {
    set_up: PathBuf,
    server: PathBuf,
}

impl Programs {
    fn find_or_install() -> Result<Self, String> {
        if let Some(found) = Self::find() {
            return Ok(found);
        }
        MISSING.install()?;
        Self::find().ok_or_else(|| "mariadbd is still missing after MariaDB was installed".to_owned())
    }

    fn find() -> Option<Self> {
        // The setup needs the third program.
        find("my_print_defaults")?;
        Some(Self { set_up: find("mariadb-install-db")?, server: find("mariadbd")? })
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use cancel_safe_campaign::publish_not_run;

    use super::*;

    #[test]
    fn a_server_answers_and_a_dropped_one_does_not() {
        let Some(programs) = Programs::find() else {
            let named = env::var_os(MariaDb::VARIABLE).is_some();
            assert!(named, "MariaDB is installed, or a server is named: `cargo xtask ci` sees to it");
            return publish_not_run("xtask", "a private MariaDB", "a server is named, and mariadbd is missing");
        };
        let server = MariaDb::server(&programs).unwrap();
        let address = server.url().split(['@', '/']).nth(3).unwrap().to_owned();
        TcpStream::connect(&address).unwrap();
        drop(server);
        assert!(TcpStream::connect(&address).is_err());
    }

    #[test]
    fn a_login_is_read_as_the_driver_reads_it() {
        let login = Login::of(&Url::parse("mysql://u%40h:p%2Fw%C3%A9%25@db:3307/x").unwrap());
        assert_eq!((login.host.as_str(), login.port), ("db", 3307));
        assert_eq!((login.user.as_str(), login.password.as_str()), ("u@h", "p/wé%"));
        assert_eq!(decoded("100%"), "100%");
        assert_eq!(Login::of(&Url::parse("mysql://root@localhost/x").unwrap()).port, 3306);
    }
}
