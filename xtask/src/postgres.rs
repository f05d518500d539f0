//! The PostgreSQL of the tests: a private cluster, or a private schema in a server that the user names.
//!
//! Invariant: nothing that belongs to others is touched. `DATABASE_URL` is never read, on a named server only a schema
//! made for this run is used, and an unavailable server is an error with the command that fixes it.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use url::Url;

use crate::mariadb::decoded;
use crate::missing::{Missing, may_be_installed};
use crate::server::{Home, Keeper, PORT_ATTEMPTS, PrivateServer, Recipe, free_port};

const MISSING: Missing = Missing {
    name: "PostgreSQL",
    debian: "postgresql",
    fedora: "postgresql-server",
    arch: "postgresql",
    alpine: "postgresql postgresql-contrib",
    homebrew: "postgresql@17",
};

/// The programs for a private cluster, and those for a schema in a user's server.
const OF_A_CLUSTER: [&str; 2] = ["initdb", "postgres"];
const OF_A_SCHEMA: [&str; 1] = ["psql"];

/// The PostgreSQL of a run, and how to end it.
pub(crate) struct Database {
    url: String,
    _hold: Hold,
}

/// Owns what must be removed after the tests.
enum Hold {
    Cluster { _server: PrivateServer },
    Schema { _keeper: Keeper },
}

impl Database {
    /// The variable that names the server for the tests. A user sets it to use another server.
    pub(crate) const VARIABLE: &str = "CANCEL_SAFE_TEST_POSTGRES_URL";

    /// A schema in the server that the user named, or else a private cluster.
    pub(crate) fn for_tests() -> Result<Self, String> {
        match env::var(Self::VARIABLE) {
            Ok(url) => Self::schema(&url),
            Err(_) => Self::cluster(&programs_or_install(&OF_A_CLUSTER)?),
        }
    }

    /// What has to be installed first.
    pub(crate) fn missing() -> Option<Missing> {
        let needed: &[&str] = if env::var_os(Self::VARIABLE).is_some() { &OF_A_SCHEMA } else { &OF_A_CLUSTER };
        programs(needed).is_none().then_some(MISSING)
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    fn cluster(programs: &Path) -> Result<Self, String> {
        let mut attempt = 1;
        loop {
            let port = free_port()?;
            match start(programs, port) {
                Ok(server) => {
                    let url = format!("postgres://postgres@127.0.0.1:{port}/postgres");
                    println!("PostgreSQL of these tests: {url} ({})", programs.display());
                    return Ok(Self { url, _hold: Hold::Cluster { _server: server } });
                }
                Err(error) if error.contains("Address already in use") && attempt < PORT_ATTEMPTS => attempt += 1,
                Err(error) => return Err(error),
            }
        }
    }

    fn schema(url: &str) -> Result<Self, String> {
        let psql = programs_or_install(&OF_A_SCHEMA)?.join("psql");
        let schema = format!("cancel_safe_test_{}", std::process::id());
        let create = format!("DROP SCHEMA IF EXISTS {schema} CASCADE; CREATE SCHEMA {schema}");
        let (open, password) = without_password(url)?;
        let output = Command::new(&psql)
            .args(["--no-psqlrc", "--quiet", "--set", "ON_ERROR_STOP=1", "--dbname", &open, "--command", &create])
            .envs(secret(&password))
            .output()
            .map_err(|error| format!("{} could not be started: {error}", psql.display()))?;
        if !output.status.success() {
            // The URL may hold a password, so the variable is named instead.
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(format!("no schema could be made in the server of {}: {said}", Self::VARIABLE));
        }
        let script = r#"read -r _; exec "$1" --no-psqlrc --quiet --dbname "$2" --command "$3""#;
        let program = psql.to_string_lossy();
        let remove = format!("DROP SCHEMA {schema} CASCADE");
        let keeper = Keeper::hold(script, &[&program, &open, &remove], secret(&password), Path::new("/"), None)?;
        println!("PostgreSQL of these tests: the schema {schema} in the server of {}", Self::VARIABLE);
        Ok(Self { url: with_search_path(url, &schema), _hold: Hold::Schema { _keeper: keeper } })
    }
}

fn start(programs: &Path, port: u16) -> Result<PrivateServer, String> {
    let home = Home::create("postgres")?;
    let program = |name: &str| programs.join(name).to_string_lossy().into_owned();
    let (initdb, postgres) = (program("initdb"), program("postgres"));
    let (port, sockets) = (format!("port={port}"), format!("unix_socket_directories={}", home.path.display()));
    let recipe = Recipe {
        name: "PostgreSQL",
        set_up: &[
            &initdb,
            "--pgdata=data",
            "--username=postgres",
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",
        ],
        serve: &[
            &postgres,
            "-D",
            "data",
            "-c",
            &port,
            "-c",
            &sockets,
            "-c",
            "listen_addresses=127.0.0.1",
            // Tests fill several pools at a time on purpose, and the campaigns fill one of a thousand connections.
            "-c",
            "max_connections=1200",
            // No test cuts the power of this server, and a killed server loses nothing that it has passed to the
            // kernel.
            "-c",
            "fsync=off",
        ],
        // Disconnect clients, roll back, write the last checkpoint.
        stop_signal: "INT",
    };
    PrivateServer::start(home, &recipe, is_ready)
}

/// The server says in the eighth line of its pid file that it answers.
fn is_ready(home: &Path) -> bool {
    let pid_file = fs::read_to_string(home.join("data/postmaster.pid")).unwrap_or_default();
    pid_file.lines().nth(7).is_some_and(|status| status.trim() == "ready")
}

fn programs_or_install(names: &[&str]) -> Result<PathBuf, String> {
    if let Some(found) = programs(names) {
        return Ok(found);
    }
    install()?;
    programs(names).ok_or_else(|| format!("{} is still missing after PostgreSQL was installed", names.join(" or ")))
}

/// The first directory that has all the named programs.
fn programs(names: &[&str]) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let configured = Command::new("pg_config").arg("--bindir").output().ok().filter(|output| output.status.success());
    let bindir = configured.map(|output| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()));
    env::split_paths(&path)
        .chain(versions(Path::new("/usr/lib/postgresql"), ""))
        // Homebrew links no versioned one into PATH.
        .chain(["/opt/homebrew/opt", "/usr/local/opt"].iter().flat_map(|kegs| versions(Path::new(kegs), "postgresql@")))
        .chain(bindir)
        .find(|directory| names.iter().all(|name| directory.join(name).is_file()))
}

/// Debian and Homebrew keep the server's programs out of PATH, one directory for each major version; the newest comes first.
fn versions(base: &Path, prefix: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(base).into_iter().flatten().flatten();
    let version = |entry: fs::DirEntry| entry.file_name().to_str()?.strip_prefix(prefix)?.parse().ok();
    let mut versions: Vec<u32> = entries.filter_map(version).collect();
    versions.sort_unstable_by(|a, b| b.cmp(a));
    versions.into_iter().map(|version| base.join(format!("{prefix}{version}")).join("bin")).collect()
}

fn install() -> Result<(), String> {
    // Debian's package starts a system-wide cluster; this setting, present only while we install, prevents that.
    let directory = Path::new("/etc/postgresql-common/createcluster.d");
    let setting = directory.join("cancel-safe.conf");
    may_be_installed(&[MISSING])?;
    let written = fs::create_dir_all(directory).and_then(|()| fs::write(&setting, "create_main_cluster = false\n"));
    written.map_err(|error| format!("{}: {error}", setting.display()))?;
    let installed = MISSING.install();
    let removed = fs::remove_file(&setting);
    installed?;
    removed.map_err(|error| format!("{}: {error}", setting.display()))
}

fn with_search_path(url: &str, schema: &str) -> String {
    let separator = if url.contains('?') { '&' } else { '?' };
    format!("{url}{separator}options=-c%20search_path%3D{schema}")
}

/// The URL without its password, and the password. All users of the machine can see arguments.
fn without_password(url: &str) -> Result<(String, Option<String>), String> {
    let broken = |what: &str| format!("{}: {what}", Database::VARIABLE);
    let mut url = Url::parse(url).map_err(|error| broken(&error.to_string()))?;
    if url.query_pairs().any(|(name, _)| name == "password") {
        return Err(broken("give the password as postgres://user:password@…, with each special character as %XX"));
    }
    let password = url.password().map(decoded);
    if password.is_some() {
        url.set_password(None).map_err(|()| broken("its password cannot be taken out"))?;
    }
    Ok((url.into(), password))
}

fn secret(password: &Option<String>) -> Option<(&str, &str)> {
    password.as_deref().map(|password| ("PGPASSWORD", password))
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use cancel_safe_campaign::publish_not_run;

    use super::*;

    #[test]
    fn a_cluster_answers_and_a_dropped_one_does_not() {
        let Some(programs) = programs(&OF_A_CLUSTER) else {
            let named = env::var_os(Database::VARIABLE).is_some();
            assert!(named, "PostgreSQL is installed, or a server is named: `cargo xtask ci` sees to it");
            return publish_not_run("xtask", "a private cluster", "a server is named, and initdb is missing");
        };
        let database = Database::cluster(&programs).unwrap();
        let address = database.url().split(['@', '/']).nth(3).unwrap().to_owned();
        TcpStream::connect(&address).unwrap();
        drop(database);
        assert!(TcpStream::connect(&address).is_err());
    }

    #[test]
    fn a_schema_is_named_in_the_url_beside_what_the_user_asked_for() {
        assert_eq!(with_search_path("postgres://h/d", "s"), "postgres://h/d?options=-c%20search_path%3Ds");
        assert_eq!(
            with_search_path("postgres://h/d?sslmode=disable", "s"),
            "postgres://h/d?sslmode=disable&options=-c%20search_path%3Ds"
        );
    }

    #[test]
    fn a_password_is_no_argument() {
        let (open, password) = without_password("postgres://u:s%2Fc@h:5433/d?sslmode=disable").unwrap();
        assert_eq!((open.as_str(), password.as_deref()), ("postgres://u@h:5433/d?sslmode=disable", Some("s/c")));
        assert_eq!(without_password("postgres://u@h/d").unwrap(), ("postgres://u@h/d".to_owned(), None));
        assert!(!without_password("postgres://u@h/d?password=secret").unwrap_err().contains("secret"));
    }

    #[test]
    fn of_several_versions_the_newest_is_taken() {
        let base = tempfile::tempdir().unwrap();
        for version in ["9", "15", "17", "common", "postgresql@16", "postgresql@18", "mysql@8"] {
            fs::create_dir_all(base.path().join(version)).unwrap();
        }
        let found = |prefix| versions(base.path(), prefix);
        assert_eq!(found(""), ["17/bin", "15/bin", "9/bin"].map(|path| base.path().join(path)));
        assert_eq!(found("postgresql@"), ["postgresql@18/bin", "postgresql@16/bin"].map(|path| base.path().join(path)));
        assert!(versions(&base.path().join("none"), "").is_empty());
    }
}
