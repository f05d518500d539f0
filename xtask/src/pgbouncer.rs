//! The pooler of the tests: a private PgBouncer in front of the PostgreSQL of the tests, which gives each transaction
//! another session.
//!
//! Invariant: it is ours alone. It listens on a free port of 127.0.0.1, and it stops with the tests. It requires a
//! password generated for this run, because the server behind it may belong to the user. If it has to be installed, the
//! system-wide service is not started.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use url::Url;

use crate::mariadb::decoded;
use crate::missing::{Missing, find, may_be_installed};
use crate::server::{Home, PORT_ATTEMPTS, PrivateServer, Recipe, free_port};

const MISSING: Missing = Missing {
    name: "PgBouncer",
    debian: "pgbouncer",
    fedora: "pgbouncer",
    arch: "pgbouncer",
    alpine: "pgbouncer",
    homebrew: "pgbouncer",
};

/// Debian asks this program whether a service may be started.
const POLICY: &str = "/usr/sbin/policy-rc.d";
const START_NOTHING: &str = "#!/bin/sh\nexit 101\n";

/// The user for the pooler. Behind the pooler this is the user of the server's URL.
const USER: &str = "cancel_safe_tests";

pub(crate) struct PgBouncer {
    url: String,
    _server: PrivateServer,
}

impl PgBouncer {
    /// The variable that names it for the tests.
    pub(crate) const VARIABLE: &str = "CANCEL_SAFE_TEST_PGBOUNCER_URL";

    /// A pooler in front of the server at `postgres`.
    pub(crate) fn in_front_of(postgres: &str) -> Result<Self, String> {
        let behind = Behind::of(postgres)?;
        let program = find_or_install()?;
        let password = password()?;
        let mut attempt = 1;
        loop {
            let port = free_port()?;
            match start(&program, port, &behind, &password) {
                Ok(server) => {
                    println!("PgBouncer of these tests: 127.0.0.1:{port} ({})", program.display());
                    let url = format!("postgres://{USER}:{password}@127.0.0.1:{port}/{}", behind.database);
                    return Ok(Self { url, _server: server });
                }
                Err(error) if error.contains("Address already in use") && attempt < PORT_ATTEMPTS => attempt += 1,
                Err(error) => return Err(error),
            }
        }
    }

    /// What has to be installed first.
    pub(crate) fn missing() -> Option<Missing> {
        find("pgbouncer").is_none().then_some(MISSING)
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }
}

/// The server whose sessions are shared.
struct Behind {
    database: String,
    /// In PgBouncer's syntax.
    connect: String,
}

impl Behind {
    fn of(url: &str) -> Result<Self, String> {
        // The URL may hold a password, so the error does not show it.
        let url = Url::parse(url).map_err(|error| format!("the URL of the server behind PgBouncer: {error}"))?;
        let host = url.host_str().ok_or("PgBouncer needs the host of the server behind it in the URL")?;
        let user = if url.username().is_empty() { "postgres".to_owned() } else { decoded(url.username()) };
        let database = Some(decoded(url.path().trim_start_matches('/'))).filter(|name| !name.is_empty());
        let mut connect = vec![("host", host.to_owned()), ("port", url.port().unwrap_or(5432).to_string())];
        connect.push(("user", user.clone()));
        if let Some(password) = url.password() {
            connect.push(("password", decoded(password)));
        }
        // The schema for the tests in a user's server.
        let options = url.query_pairs().find(|(name, _)| name == "options").map(|(_, value)| value.into_owned());
        if let Some(path) = options.as_deref().and_then(|options| options.strip_prefix("-c search_path=")) {
            connect.push(("connect_query", format!("SET search_path = {path}")));
        }
        let connect: Vec<_> =
            connect.iter().map(|(key, value)| format!("{key}='{}'", value.replace('\'', "''"))).collect();
        Ok(Self { database: database.unwrap_or(user), connect: connect.join(" ") })
    }
}

/// A text of 32 digits that nobody can guess.
fn password() -> Result<String, String> {
    let mut bytes = [0; 16];
    let random = File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut bytes));
    random.map_err(|error| format!("/dev/urandom: {error}"))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn start(program: &Path, port: u16, behind: &Behind, password: &str) -> Result<PrivateServer, String> {
    // Nobody else can look into its directory.
    let home = Home::create("pgbouncer")?;
    let (settings, users) = (home.path.join("pgbouncer.ini"), home.path.join("users"));
    let configuration = configuration(port, behind, &users);
    for (path, text) in [(&settings, configuration), (&users, format!("\"{USER}\" \"{password}\"\n"))] {
        fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    let (program, settings) = (program.to_string_lossy(), settings.to_string_lossy());
    let recipe = Recipe { name: "PgBouncer", set_up: &["true"], serve: &[&program, &settings], stop_signal: "TERM" };
    PrivateServer::start(home, &recipe, is_ready)
}

fn configuration(port: u16, behind: &Behind, users: &Path) -> String {
    let Behind { connect, .. } = behind;
    [
        "[databases]",
        &format!("* = {connect}"),
        "[pgbouncer]",
        "listen_addr = 127.0.0.1",
        &format!("listen_port = {port}"),
        "unix_socket_dir =",
        "auth_type = md5",
        &format!("auth_file = {}", users.display()),
        "pool_mode = transaction",
        // Storms hold many sessions at the same time.
        "default_pool_size = 150",
        "max_client_conn = 1000",
        "ignore_startup_parameters = extra_float_digits,options",
        "",
    ]
    .join("\n")
}

/// It says so in its log, which is its output.
fn is_ready(home: &Path) -> bool {
    let log = fs::read(home.join("log")).unwrap_or_default();
    String::from_utf8_lossy(&log).contains("process up")
}

fn find_or_install() -> Result<PathBuf, String> {
    if let Some(found) = find("pgbouncer") {
        return Ok(found);
    }
    may_be_installed(&[MISSING])?;
    let policy = Path::new(POLICY);
    let is_ours = !policy.exists();
    if is_ours {
        write_program(policy).map_err(|error| format!("{POLICY}: {error}"))?;
    }
    let installed = MISSING.install();
    if is_ours {
        fs::remove_file(policy).map_err(|error| format!("{POLICY}: {error}"))?;
    }
    installed?;
    find("pgbouncer").ok_or_else(|| "pgbouncer is still missing after it was installed".to_owned())
}

fn write_program(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;

    fs::write(path, START_NOTHING)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_server_behind_is_read_as_the_driver_reads_it() {
        let url = "postgres://u%40h:it's@db:5433/x?sslmode=disable&options=-c%20search_path%3Ds";
        let behind = Behind::of(url).unwrap();
        assert_eq!(behind.database, "x");
        let connect = "host='db' port='5433' user='u@h' password='it''s' connect_query='SET search_path = s'";
        assert_eq!(behind.connect, connect);
        assert_eq!(Behind::of("postgres://u@db").unwrap().database, "u");
        assert!(!Behind::of("postgres:secret").err().unwrap().contains("secret"));
    }
}
