//! The page of the bank in a headless Chromium, driven over its pipe for developer tools.
#![cfg(unix)]

use std::path::Path;
use std::process::Stdio;

use cancel_safe_campaign::publish_not_run;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::{Duration, sleep, timeout};

use crate::bank::start;
use crate::wire::PATIENCE;

struct Browser {
    _child: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
    sent: u64,
    session: Value,
    _profile: TempDir,
}

impl Browser {
    /// `None` if there is no Chromium.
    async fn open(url: &str) -> Option<Self> {
        let path = std::env::var_os("PATH").unwrap();
        let names = ["chromium", "chromium-browser", "google-chrome"];
        let chromium = std::env::split_paths(&path)
            .flat_map(|directory| names.map(|name| directory.join(name)))
            .find(|program| program.is_file())?;
        let profile = tempfile::tempdir().unwrap();
        // Its tools' pipe is file descriptors 3 and 4, which a shell can give it and we cannot without unsafe code.
        let script = r#"exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1"#;
        let mut child = Command::new("sh")
            .args(["-c", script])
            .arg(chromium)
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"])
            .args(["--remote-debugging-pipe", "--window-size=1100,900"])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let (commands, answers) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut browser = Self { _child: child, commands, answers, sent: 0, session: Value::Null, _profile: profile };
        let target = browser.call("Target.createTarget", json!({ "url": url })).await["targetId"].clone();
        let attach = json!({ "targetId": target, "flatten": true });
        browser.session = browser.call("Target.attachToTarget", attach).await["sessionId"].clone();
        Some(browser)
    }

    async fn call(&mut self, method: &str, params: Value) -> Value {
        self.sent += 1;
        let mut command = json!({ "id": self.sent, "method": method, "params": params });
        if !self.session.is_null() {
            command["sessionId"] = self.session.clone();
        }
        let text = format!("{command}\0");
        self.commands.write_all_buf(&mut text.as_bytes()).await.unwrap();
        let answer = async {
            loop {
                let mut answer = Vec::new();
                self.answers.read_until(0, &mut answer).await.unwrap();
                let answer: Value = serde_json::from_slice(answer.strip_suffix(b"\0").expect("it has ended")).unwrap();
                if answer["id"] == self.sent {
                    return answer;
                }
            }
        };
        let mut answer = timeout(PATIENCE, answer).await.unwrap_or_else(|_| panic!("no answer to {method}"));
        assert!(answer.get("error").is_none(), "{method}: {answer}");
        answer["result"].take()
    }

    async fn evaluate(&mut self, script: &str) -> Value {
        let params = json!({ "expression": script, "returnByValue": true, "awaitPromise": true });
        let mut result = self.call("Runtime.evaluate", params).await;
        assert!(result.get("exceptionDetails").is_none(), "{script}: {result}");
        result["result"]["value"].take()
    }

    /// Waits until the script returns true.
    async fn until(&mut self, script: &str) {
        let waiting = async {
            while self.evaluate(script).await != true {
                sleep(Duration::from_millis(20)).await;
            }
        };
        if timeout(PATIENCE, waiting).await.is_err() {
            let text = self.evaluate("document.body.innerText").await;
            panic!("it never is: {script}\n{text}");
        }
    }

    async fn press(&mut self, key: &str, code: u32, text: &str) {
        for kind in ["keyDown", "keyUp"] {
            let mut params = json!({ "type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code });
            if kind == "keyDown" && !text.is_empty() {
                params["text"] = text.into();
            }
            self.call("Input.dispatchKeyEvent", params).await;
        }
    }

    /// Saves a screenshot, if a directory for it is set.
    async fn picture(&mut self, name: &str) {
        let Some(directory) = std::env::var_os("BANK_SCREENSHOTS") else { return };
        let shown = self.call("Page.captureScreenshot", json!({ "captureBeyondViewport": true })).await;
        let script = format!("base64 -d > {name}.png");
        let mut decode = Command::new("sh")
            .args(["-c", &script])
            .current_dir(Path::new(&directory))
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = decode.stdin.take().unwrap();
        input.write_all_buf(&mut shown["data"].as_str().unwrap().as_bytes()).await.unwrap();
        drop(input);
        assert!(decode.wait().await.unwrap().success());
    }
}

/// The lowest contrast between a text and what is behind it, by the formula of the accessibility guidelines.
const LOWEST_CONTRAST: &str = r#"(() => {
    const parse = (colour) => colour.match(/[\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map((part) => part / 255)
        .map((part) => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
        .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
    const behind = (element) => {
        const colour = parse(getComputedStyle(element).backgroundColor);
        return colour[3] === 0 ? behind(element.parentElement) : colour;
    };
    const texts = [...document.querySelectorAll("h1, h2, th, td, button, p, span, b, li")];
    return Math.min(...texts.map((element) => {
        const [one, other] = [light(parse(getComputedStyle(element).color)), light(behind(element))];
        return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    }));
})()"#;

const COUNT: &str =
    "[...document.querySelectorAll('#ends td')].reduce((sum, cell) => sum + Number(cell.textContent), 0)";

/// A connection may be dropped before anything is sent on it. Slow as transfers are, none is answered in time.
async fn drop_until_the_server_sees_it(browser: &mut Browser) {
    let dropped = "[...document.querySelectorAll('#log li')]
        .filter((line) => line.textContent.endsWith(' ms, and not committed')).length";
    let cut = "[...document.querySelectorAll('#ends tr')]
        .some((row) => row.cells[0].textContent === 'cut' && Number(row.cells[1].textContent) > 0)";
    for number in 1..=100 {
        browser.until(&format!("{dropped} >= {number}")).await;
        // By then another event had come.
        let now = browser.evaluate("document.getElementById('uptime').textContent").await;
        browser.until(&format!("document.getElementById('uptime').textContent !== {now}")).await;
        if browser.evaluate(cut).await == true {
            return;
        }
        browser.press("Enter", 13, "\r").await;
    }
    panic!("none of a hundred connections was dropped in the middle of its transfer");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_lives_in_a_browser_light_and_dark_and_its_buttons_do_something() {
    let bank = start().await;
    let Some(mut browser) = Browser::open(&format!("http://{}/", bank.addr)).await else {
        return publish_not_run("examples", "bank/page", "chromium is not installed");
    };
    browser.until("document.getElementById('state')?.textContent === 'ready'").await;
    browser.until("document.querySelectorAll('#balances tr').length === 10").await;
    browser.until("document.getElementById('sum').textContent === '10000'").await;
    browser.until("document.querySelector('#workers th').textContent === 'database'").await;

    // Each button is reached by the Tab key, in the order of the page, shows that it is, and is pressed by Enter.
    for id in ["steady", "burst", "slow", "drop"] {
        browser.press("Tab", 9, "").await;
        browser.until(&format!("document.activeElement.id === '{id}'")).await;
        let outline = browser.evaluate("getComputedStyle(document.activeElement).outlineStyle").await;
        assert_eq!(outline, "solid", "{id}");
        browser.press("Enter", 13, "\r").await;
        match id {
            "steady" => {
                browser.until(&format!("{COUNT} >= 3")).await;
                browser.press("Enter", 13, "\r").await;
                browser.until("document.activeElement.ariaPressed === 'false'").await;
            }
            "burst" => {
                browser.until("document.querySelector('#log li')?.textContent.startsWith('burst: ')").await;
                browser.until(&format!("{COUNT} >= 100")).await;
            }
            "slow" => browser.until("document.activeElement.ariaPressed === 'true'").await,
            _ => drop_until_the_server_sees_it(&mut browser).await,
        }
    }
    let unnamed = "[...document.querySelectorAll('section, table, ol')]
        .filter((element) => !element.ariaLabel && !element.getAttribute('aria-labelledby')).length";
    assert_eq!(browser.evaluate(unnamed).await, 0);

    for scheme in ["light", "dark"] {
        let media = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        browser.call("Emulation.setEmulatedMedia", media).await;
        let contrast = browser.evaluate(LOWEST_CONTRAST).await.as_f64().unwrap();
        assert!(contrast >= 4.5, "{scheme}: {contrast}");
        browser.picture(scheme).await;
    }
    let schemes = "getComputedStyle(document.body).backgroundColor";
    assert_eq!(browser.evaluate(schemes).await, "rgb(18, 22, 28)", "it stays light in the dark");

    // The page says that the server has gone. Its stream does not hold the stop.
    bank.tell_to_stop();
    assert!(bank.ends().await.success());
    browser.until("document.getElementById('state').textContent === 'not connected'").await;
}
