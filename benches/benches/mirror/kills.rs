//! What is under the final names when the client has been killed with SIGKILL.

use std::path::Path;
use std::time::Duration;

use super::clients::{self, Job};
use super::grounds::Ground;
use super::origin::Origin;

const FILES: usize = 400;
const BYTES: usize = 512 * 1024;
const KILLS: usize = 10;
/// When it is killed, at least and at most, in milliseconds after its start: nobody is through by then.
const MOMENT_MS: std::ops::Range<u64> = 150..900;

/// Kills each client at the same random moments, each time from an empty directory.
pub(crate) fn compare(ground: &Ground, scratch: &Path, mirror: &Path) {
    let root = scratch.join("served-slowly");
    let names: Vec<String> = (0..FILES).map(|number| format!("slow/{}/{number}", number % 10)).collect();
    let mut random = fastrand::Rng::new();
    let mut contents = Vec::new();
    for name in &names {
        let mut content = vec![0; BYTES];
        random.fill(&mut content);
        let path = root.join(name);
        std::fs::create_dir_all(path.parent().expect("a directory")).expect("a writable directory");
        std::fs::write(path, &content).expect("a writable directory");
        contents.push(content);
    }
    let origin = Origin::over(&root, scratch);
    let out = ground.path.join("killed");
    let job = Job { base: &origin.base, names: &names, out: &out };
    let moments: Vec<u64> = (0..KILLS).map(|_| random.u64(MOMENT_MS)).collect();
    println!(
        "\n{KILLS} × SIGKILL amid {FILES} files of 512 KiB from {}; under their final names were then:",
        origin.name
    );
    println!("  {:<46}{:>8}{:>14}", "", "whole", "not whole");
    for client in clients::all(mirror) {
        let (mut whole, mut torn) = (0, 0);
        for moment in &moments {
            let _absent = std::fs::remove_dir_all(&out);
            std::fs::create_dir_all(&out).expect("a writable directory");
            let mut child = client.command(&job).spawn().expect("an executable");
            std::thread::park_timeout(Duration::from_millis(*moment));
            child.kill().expect("a child");
            child.wait().expect("a child");
            let files = (client.files)(&job);
            for (name, content) in names.iter().zip(&contents) {
                match std::fs::read(files.join(name)) {
                    Ok(found) if found == *content => whole += 1,
                    Ok(_) => torn += 1,
                    Err(_) => {}
                }
            }
        }
        println!("  {:<46}{whole:>8}{torn:>14}", client.name);
    }
    let _absent = std::fs::remove_dir_all(&out);
}
