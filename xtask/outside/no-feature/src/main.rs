//! The error for a user who has chosen no feature of the umbrella.

fn main() {
    let _never = cancel_safe::atomic_fs::write("settings.toml", "colour = 7");
}
