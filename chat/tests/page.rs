//! The page, in a real browser.

#![allow(missing_docs, clippy::wildcard_enum_match_arm)]

use fantoccini::{Client, ClientBuilder, Locator};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use testkit::instance::Instance;
use testkit::proxy::{Mode, Proxy};
use testkit::{free_port, seed, until};

/// A headless Chromium with its driver; both end with it.
struct Browser {
    driver: Child,
    port: u16,
    _profile: tempfile::TempDir,
    options: Value,
}

impl Browser {
    fn start() -> Self {
        let port = free_port();
        let driver = Command::new("chromedriver")
            .arg(format!("--port={port}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("chromedriver is not here: run the tests with ./test, which installs it");
        let profile = tempfile::tempdir().unwrap();
        let options = json!({"args": [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1000,700",
            format!("--user-data-dir={}", profile.path().display()),
        ]});
        Self {
            driver,
            port,
            _profile: profile,
            options,
        }
    }

    async fn client(&self) -> Client {
        until("the browser starts", async || {
            let capabilities = json!({"goog:chromeOptions": self.options})
                .as_object()
                .unwrap()
                .clone();
            let connector = hyper_util::client::legacy::connect::HttpConnector::new();
            ClientBuilder::new(connector)
                .capabilities(capabilities)
                .connect(&format!("http://127.0.0.1:{}", self.port))
                .await
                .ok()
        })
        .await
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

async fn embedded() -> (tempfile::TempDir, Instance) {
    let folder = tempfile::tempdir().unwrap();
    let settings = [
        ("LIMITS__SENDS_BURST", "10000"),
        ("LIMITS__SENDS_PER_SECOND", "10000"),
    ];
    let instance = Instance::start_embedded(folder.path(), &settings).await;
    (folder, instance)
}

async fn eval(page: &Client, script: &str) -> Value {
    page.execute(&format!("return {script};"), Vec::new())
        .await
        .unwrap()
}

async fn until_page(page: &Client, condition: &str) {
    until(condition, async || {
        (eval(page, condition).await == json!(true)).then_some(())
    })
    .await;
}

async fn sign_in(page: &Client, url: &str, user: u64) {
    page.goto(url).await.unwrap();
    page.wait()
        .for_element(Locator::Css("#user"))
        .await
        .unwrap()
        .send_keys(&user.to_string())
        .await
        .unwrap();
    page.find(Locator::Css("#sign-in-form button"))
        .await
        .unwrap()
        .click()
        .await
        .unwrap();
    until_page(
        page,
        "document.getElementById('state').textContent === 'connected'",
    )
    .await;
}

async fn open(page: &Client, with: u64) {
    page.find(Locator::Css("#open-with"))
        .await
        .unwrap()
        .send_keys(&with.to_string())
        .await
        .unwrap();
    page.find(Locator::Css("#open-form button"))
        .await
        .unwrap()
        .click()
        .await
        .unwrap();
}

async fn write(page: &Client, text: &str) {
    page.find(Locator::Css("#text"))
        .await
        .unwrap()
        .send_keys(text)
        .await
        .unwrap();
    page.find(Locator::Css("#send-form button"))
        .await
        .unwrap()
        .click()
        .await
        .unwrap();
}

const SHOWN: &str =
    "[...document.querySelectorAll('#log li:not(.pending) .text')].map(e => e.textContent)";

async fn until_shown(page: &Client, texts: &[&str]) {
    until_page(
        page,
        &format!(
            "JSON.stringify({SHOWN}) === JSON.stringify({})",
            json!(texts)
        ),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_people_talk_in_their_tabs_and_a_second_tab_hears_both() {
    let (_folder, instance) = embedded().await;
    let browser = Browser::start();
    let page = browser.client().await;
    sign_in(&page, &instance.url, 7).await;
    let seven = page.window().await.unwrap();
    let another = async |user: u64, with: u64| {
        let tab = page.new_window(true).await.unwrap().handle;
        page.switch_to_window(tab.clone()).await.unwrap();
        sign_in(&page, &instance.url, user).await;
        open(&page, with).await;
        tab
    };
    let second = another(7, 42).await;
    let forty_two = another(42, 7).await;
    page.switch_to_window(seven.clone()).await.unwrap();
    open(&page, 42).await;
    write(&page, "hello").await;
    until_shown(&page, &["hello"]).await;
    page.switch_to_window(forty_two.clone()).await.unwrap();
    until_shown(&page, &["hello"]).await;
    write(&page, "hi there").await;
    write(&page, "how are you?").await;
    for tab in [&seven, &second, &forty_two] {
        page.switch_to_window(tab.clone()).await.unwrap();
        until_shown(&page, &["hello", "hi there", "how are you?"]).await;
    }
    // The list shows the last message, and what was not read.
    page.switch_to_window(forty_two).await.unwrap();
    let api = chat_client::Api::new(
        chat_client::Access::new(&instance.url, chat_client::TokenSource::Dev),
        9,
    )
    .await
    .unwrap();
    api.send(42, "k", "from another user").await.unwrap();
    until_page(
        &page,
        "document.querySelector('#dialogs button[data-with=\"9\"] .unread')?.textContent === '1'",
    )
    .await;
    page.find(Locator::Css("#dialogs button[data-with=\"9\"]"))
        .await
        .unwrap()
        .click()
        .await
        .unwrap();
    until_shown(&page, &["from another user"]).await;
    until_page(&page, "!document.querySelector('#dialogs .unread')").await;
    page.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tab_shows_who_is_there_who_is_typing_and_what_was_read() {
    let (_folder, instance) = embedded().await;
    let browser = Browser::start();
    let page = browser.client().await;
    sign_in(&page, &instance.url, 7).await;
    open(&page, 42).await;
    let shows =
        |id: &str, text: &str| format!("document.getElementById('{id}').textContent === '{text}'");
    until_page(&page, &shows("presence", "offline")).await;
    write(&page, "are you there?").await;
    until_page(
        &page,
        "document.querySelectorAll('#log li.mine:not(.seen):not(.pending)').length === 1",
    )
    .await;
    let access = chat_client::Access::new(&instance.url, chat_client::TokenSource::Dev);
    let (client, mut events) = chat_client::Client::start(access, 42);
    tokio::spawn(async move { while events.recv().await.is_some() {} });
    until_page(&page, &shows("presence", "online")).await;
    client.typing(7).await.unwrap();
    until_page(&page, "!document.getElementById('typing').hidden").await;
    client.send(7, "k".into(), "yes".into()).await.unwrap();
    until_shown(&page, &["are you there?", "yes"]).await;
    until_page(&page, "document.getElementById('typing').hidden").await;
    client.mark_read(7, 2).await.unwrap();
    until_page(
        &page,
        "document.querySelectorAll('#log li.mine.seen').length === 1",
    )
    .await;
    if let Ok(path) = std::env::var("CHAT_TEST_SCREENSHOT_TALK") {
        std::fs::write(path, page.screenshot().await.unwrap()).unwrap();
    }
    drop(client);
    until_page(&page, &shows("presence", "offline")).await;
    page.close().await.unwrap();
}

/// For how long the connection of a page is cut again and again, in seconds; a minute and more when
/// asked for.
fn flap_seconds() -> u64 {
    let asked = std::env::var("CHAT_TEST_FLAP_SECONDS").ok();
    asked.and_then(|seconds| seconds.parse().ok()).unwrap_or(12)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_cut_every_few_seconds_loses_doubles_and_disorders_nothing() {
    let (_folder, instance) = embedded().await;
    let proxy = Proxy::to(instance.url.trim_start_matches("http://").to_owned()).await;
    let url = format!("http://127.0.0.1:{}", proxy.port);
    let browser = Browser::start();
    let page = browser.client().await;
    sign_in(&page, &url, 7).await;
    open(&page, 42).await;
    let end = tokio::time::Instant::now() + std::time::Duration::from_secs(flap_seconds());
    let mut rng = StdRng::seed_from_u64(seed());
    let flaps = tokio::spawn({
        let proxy = proxy.clone();
        async move {
            let mut cuts = 0;
            while tokio::time::Instant::now() < end {
                let up = rng.random_range(500..3500);
                tokio::time::sleep(std::time::Duration::from_millis(up)).await;
                proxy.set(Mode::Cut);
                let down = rng.random_range(50..850);
                tokio::time::sleep(std::time::Duration::from_millis(down)).await;
                proxy.set(Mode::Pass);
                cuts += 1;
            }
            cuts
        }
    });
    let other = instance.api(42).await;
    let others = tokio::spawn(async move {
        let mut n = 0u64;
        while tokio::time::Instant::now() < end {
            other
                .send(7, &format!("o{n}"), &format!("from 42, {n}"))
                .await
                .unwrap();
            n += 1;
            tokio::time::sleep(std::time::Duration::from_millis(40)).await;
        }
        n
    });
    let seqs = async || -> Vec<u64> {
        let shown =
            "[...document.querySelectorAll('#log li[data-seq]')].map(e => Number(e.dataset.seq))";
        serde_json::from_value(eval(&page, shown).await).unwrap()
    };
    let (mut mine, mut before) = (0u64, 0);
    while tokio::time::Instant::now() < end {
        let text = json!(format!("from 7, {mine}"));
        let script = format!(
            "document.getElementById('text').value = {text}; document.getElementById('send-form').requestSubmit();"
        );
        page.execute(&script, Vec::new()).await.unwrap();
        mine += 1;
        // At every moment: no gap, no duplicate, no message out of order.
        let shown = seqs().await;
        assert_eq!(shown, (1..=shown.len() as u64).collect::<Vec<_>>());
        assert!(shown.len() >= before);
        before = shown.len();
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    let (cuts, theirs) = (flaps.await.unwrap(), others.await.unwrap());
    let count = mine + theirs;
    until("the page has everything", async || {
        (seqs().await.len() as u64 >= count).then_some(())
    })
    .await;
    let log = instance.api(42).await.log_upwards(7).await.unwrap();
    assert_eq!(log.len() as u64, count);
    let shown: Vec<String> = serde_json::from_value(eval(&page, SHOWN).await).unwrap();
    let stored: Vec<String> = log.into_iter().map(|message| message.text).collect();
    assert_eq!(shown, stored);
    let own: Vec<&String> = stored
        .iter()
        .filter(|text| text.starts_with("from 7"))
        .collect();
    let sent: Vec<String> = (0..mine).map(|n| format!("from 7, {n}")).collect();
    assert_eq!(
        own,
        sent.iter().collect::<Vec<_>>(),
        "in the order in which they were written"
    );
    println!("cut {cuts} times; {mine} messages of 7 and {theirs} of 42");
    assert!(cuts > 2);
    page.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_was_written_is_shown_as_text_and_nothing_else() {
    let (_folder, instance) = embedded().await;
    let naughty: Vec<String> = serde_json::from_str(include_str!("data/naughty.json")).unwrap();
    let api = chat_client::Api::new(
        chat_client::Access::new(&instance.url, chat_client::TokenSource::Dev),
        42,
    )
    .await
    .unwrap();
    let mut kept = Vec::new();
    for (n, text) in naughty.iter().enumerate() {
        match api.send(7, &format!("n{n}"), text).await {
            Ok(_) => kept.push(text.clone()),
            Err(chat_client::ClientError::Refused(body)) => {
                assert!(
                    text.is_empty() && body.code == chat_wire::ErrorCode::TextEmpty,
                    "{text:?}: {body:?}"
                );
            }
            Err(e) => panic!("{text:?}: {e}"),
        }
    }
    assert!(kept.len() > 200);
    let log: Vec<String> = api
        .log_upwards(7)
        .await
        .unwrap()
        .into_iter()
        .map(|message| message.text)
        .collect();
    assert!(log == kept, "byte for byte");

    let browser = Browser::start();
    let page = browser.client().await;
    sign_in(&page, &instance.url, 7).await;
    page.execute("window.attacked = []; for (const f of ['alert', 'prompt', 'confirm']) window[f] = (x) => window.attacked.push(x);", Vec::new()).await.unwrap();
    open(&page, 42).await;
    until_page(&page, "document.querySelectorAll('#log li').length === 50").await;
    while eval(&page, "document.getElementById('older').hidden").await == json!(false) {
        let before = eval(&page, "document.querySelectorAll('#log li').length").await;
        page.execute("document.getElementById('older').click();", Vec::new())
            .await
            .unwrap();
        until_page(
            &page,
            &format!("document.querySelectorAll('#log li').length > {before}"),
        )
        .await;
    }
    let shown: Vec<String> = serde_json::from_value(eval(&page, SHOWN).await).unwrap();
    for (shown, kept) in shown.iter().zip(&kept) {
        assert_eq!(shown, kept);
    }
    assert_eq!(shown.len(), kept.len());
    assert_eq!(eval(&page, "window.attacked").await, json!([]));
    assert_eq!(eval(&page, "document.querySelectorAll('#log script, #log img, #log a, #log iframe, #log svg').length").await, json!(0));
    assert_eq!(eval(&page, "document.title").await, json!("chat"));
    if let Ok(path) = std::env::var("CHAT_TEST_SCREENSHOT") {
        page.execute(
            "document.getElementById('log-box').scrollTop = 6000;",
            Vec::new(),
        )
        .await
        .unwrap();
        std::fs::write(path, page.screenshot().await.unwrap()).unwrap();
    }
    page.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tab_goes_on_by_itself_when_the_server_returns() {
    let folder = tempfile::tempdir().unwrap();
    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let settings = [("LISTEN", listen.as_str())];
    let mut instance = Instance::start_embedded(folder.path(), &settings).await;
    let browser = Browser::start();
    let page = browser.client().await;
    sign_in(&page, &instance.url, 7).await;
    open(&page, 42).await;
    write(&page, "before").await;
    until_shown(&page, &["before"]).await;
    instance.kill();
    until_page(&page, "document.getElementById('state').textContent.startsWith('offline') || document.getElementById('state').textContent === 'connecting…'").await;
    write(&page, "written while it was away").await;
    let instance = Instance::start_embedded(folder.path(), &settings).await;
    until_shown(&page, &["before", "written while it was away"]).await;
    instance
        .api(42)
        .await
        .send(7, "k", "and an answer")
        .await
        .unwrap();
    until_shown(
        &page,
        &["before", "written while it was away", "and an answer"],
    )
    .await;
    assert_eq!(
        instance.api(42).await.log_upwards(7).await.unwrap().len(),
        3
    );
    page.close().await.unwrap();
}

/// Writes a text and submits the form, as the keyboard does.
async fn submit(page: &Client, text: &str) {
    let script = format!(
        "document.getElementById('text').value = {}; document.getElementById('send-form').requestSubmit();",
        json!(text)
    );
    page.execute(&script, Vec::new()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_that_are_refused_for_a_while_keep_their_order() {
    let folder = tempfile::tempdir().unwrap();
    let slowly = [
        ("LIMITS__SENDS_BURST", "1"),
        ("LIMITS__SENDS_PER_SECOND", "4"),
    ];
    let instance = Instance::start_embedded(folder.path(), &slowly).await;
    let browser = Browser::start();
    let page = browser.client().await;
    sign_in(&page, &instance.url, 7).await;
    open(&page, 42).await;
    let texts: Vec<String> = (0..8).map(|n| format!("text {n}")).collect();
    for text in &texts {
        submit(&page, text).await;
    }
    // They are still there when the conversation is left and opened again.
    open(&page, 43).await;
    open(&page, 42).await;
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    until_shown(&page, &texts).await;
    page.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_long_for_a_frame_fails_alone() {
    let folder = tempfile::tempdir().unwrap();
    let small = [
        ("LIMITS__TEXT_CHARS", "100"),
        ("LIMITS__FRAME_BYTES", "2000"),
    ];
    let instance = Instance::start_embedded(folder.path(), &small).await;
    let browser = Browser::start();
    let page = browser.client().await;
    sign_in(&page, &instance.url, 7).await;
    open(&page, 42).await;
    submit(&page, &"x".repeat(3000)).await;
    submit(&page, "short").await;
    until_page(
        &page,
        "document.querySelector('#log li.failed .meta')?.textContent === 'not sent: too long for this server'",
    )
    .await;
    let stored = async || instance.api(42).await.log_upwards(7).await.ok();
    until("the next one is stored", async || {
        stored()
            .await
            .filter(|log| log.len() == 1 && log[0].text == "short")
    })
    .await;
    page.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn drafts_focus_and_read_marks_stay_where_they_belong() {
    let (_folder, instance) = embedded().await;
    let browser = Browser::start();
    let page = browser.client().await;
    let other = instance.api(42).await;
    for n in 0..60 {
        other
            .send(7, &n.to_string(), &format!("message {n}"))
            .await
            .unwrap();
    }
    sign_in(&page, &instance.url, 7).await;
    // What is no user id is said so.
    page.find(Locator::Css("#open-with"))
        .await
        .unwrap()
        .send_keys("alice")
        .await
        .unwrap();
    page.find(Locator::Css("#open-form button"))
        .await
        .unwrap()
        .click()
        .await
        .unwrap();
    until_page(
        &page,
        "document.getElementById('open-error').textContent.startsWith('A user id')",
    )
    .await;
    page.execute(
        "document.getElementById('open-with').value = ''",
        Vec::new(),
    )
    .await
    .unwrap();
    // A draft belongs to a dialog.
    open(&page, 42).await;
    until_page(&page, "document.querySelectorAll('#log li').length === 50").await;
    page.find(Locator::Css("#text"))
        .await
        .unwrap()
        .send_keys("for 42 only")
        .await
        .unwrap();
    open(&page, 43).await;
    assert_eq!(
        eval(&page, "document.getElementById('text').value").await,
        json!("")
    );
    open(&page, 42).await;
    until_page(
        &page,
        "document.getElementById('text').value === 'for 42 only'",
    )
    .await;
    until_page(&page, "document.querySelectorAll('#log li').length === 50").await;
    // What is below the screen is not read.
    page.execute(
        "document.getElementById('log-box').scrollTop = 0; document.querySelector('#dialogs button').focus();",
        Vec::new(),
    )
    .await
    .unwrap();
    other.send(7, "last", "not on the screen").await.unwrap();
    until_page(
        &page,
        "document.querySelector('#dialogs .unread')?.textContent === '1'",
    )
    .await;
    // And the focus is where it was, though the list has changed.
    assert_eq!(
        eval(&page, "document.activeElement.dataset.with").await,
        json!("42")
    );
    let unread = async || instance.api(7).await.inbox(10, None).await.unwrap().dialogs[0].unread;
    assert_eq!(unread().await, 1);
    page.execute(
        "document.getElementById('log-box').scrollTop = 1e6",
        Vec::new(),
    )
    .await
    .unwrap();
    until("it is read", async || (unread().await == 0).then_some(())).await;
    until_page(&page, "!document.querySelector('#dialogs .unread')").await;
    // On a phone a lost connection is seen beside the messages.
    page.set_window_size(500, 700).await.unwrap();
    let seen = "document.getElementById('offline').offsetHeight > 0";
    assert_eq!(eval(&page, seen).await, json!(false));
    drop(instance);
    until_page(&page, seen).await;
    // The next user of the tab sees nothing of this one.
    page.find(Locator::Css("#back"))
        .await
        .unwrap()
        .click()
        .await
        .unwrap();
    page.find(Locator::Css("#sign-out"))
        .await
        .unwrap()
        .click()
        .await
        .unwrap();
    assert_eq!(
        eval(&page, "document.getElementById('log').children.length + document.getElementById('dialogs').children.length").await,
        json!(0)
    );
    let shown = eval(&page, "document.body.innerHTML").await.to_string();
    assert!(
        !shown.contains("message 5") && !shown.contains("User 42"),
        "{shown}"
    );
    page.close().await.unwrap();
}

/// How many dialogs the page writes into while it is refused and cut off; a thousand when asked
/// for.
fn order_runs() -> u64 {
    let asked = std::env::var("CHAT_TEST_ORDER_RUNS").ok();
    asked.and_then(|runs| runs.parse().ok()).unwrap_or(6)
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_keep_their_order_through_refusals_and_lost_connections() {
    let folder = tempfile::tempdir().unwrap();
    // Refusals come all the same: the page does not know the burst.
    let slowly = [
        ("LIMITS__SENDS_BURST", "4"),
        ("LIMITS__SENDS_PER_SECOND", "200"),
        ("LIMITS__FRAMES_PER_SECOND", "1000"),
    ];
    let instance = Instance::start_embedded(folder.path(), &slowly).await;
    let proxy = Proxy::to(instance.url.trim_start_matches("http://").to_owned()).await;
    let browser = Browser::start();
    let page = browser.client().await;
    sign_in(&page, &format!("http://127.0.0.1:{}", proxy.port), 7).await;
    let mut rng = StdRng::seed_from_u64(seed());
    let texts: Vec<String> = (0..6).map(|n| format!("text {n}")).collect();
    let runs = order_runs();
    for run in 0..runs {
        // All at once, as somebody who pastes; every third time the connection is cut among them.
        let cut = (run % 3 == 0).then(|| rng.random_range(0..texts.len()));
        open(&page, 100 + run).await;
        for (n, text) in texts.iter().enumerate() {
            submit(&page, text).await;
            if cut == Some(n) {
                proxy.cut();
            }
        }
    }
    // The last of them: whatever waits is stored then.
    until_page(
        &page,
        "document.querySelectorAll('#log li.pending').length === 0",
    )
    .await;
    let api = instance.api(7).await;
    for run in 0..runs {
        let log = until("all is stored", async || {
            let log = api.log_upwards(100 + run).await.ok()?;
            (log.len() >= texts.len()).then_some(log)
        })
        .await;
        let stored: Vec<String> = log.into_iter().map(|message| message.text).collect();
        assert_eq!(stored, texts, "run {run}");
    }
    println!("{runs} dialogs");
    page.close().await.unwrap();
}

/// A dialog is opened, and its newest page is read between the COMMIT of a send and its `sent`: the
/// page shows the message once, as stored.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_is_stored_is_not_shown_as_waiting() {
    let (_data, instance) = embedded().await;
    let proxy = Proxy::to(instance.url.trim_start_matches("http://").to_owned()).await;
    let browser = Browser::start();
    let page = browser.client().await;
    sign_in(&page, &format!("http://127.0.0.1:{}", proxy.port), 7).await;
    let api = instance.api(7).await;
    let waiting = "document.querySelectorAll('#log li.pending').length";
    for peer in 100..105 {
        // The page gets no answer to either request, and asks again on another connection.
        proxy.set(Mode::HangReplies);
        open(&page, peer).await;
        submit(&page, "one").await;
        until("it is stored", async || {
            let log = api.log_upwards(peer).await.ok()?;
            (log.len() == 1).then_some(())
        })
        .await;
        proxy.cut();
        until_shown(&page, &["one"]).await;
        submit(&page, "two").await;
        until_shown(&page, &["one", "two"]).await;
        assert_eq!(eval(&page, waiting).await, json!(0));
    }
    page.close().await.unwrap();
}

/// Transactions that keep all writes out of the shards of an embedded instance until they end.
fn locked_shards(data: &Path) -> Vec<rusqlite::Connection> {
    let lock = |name: u32| {
        let shard = rusqlite::Connection::open(data.join(format!("shard{name}.db"))).unwrap();
        shard.busy_timeout(Duration::from_secs(10)).unwrap();
        shard.execute_batch("BEGIN IMMEDIATE").unwrap();
        shard
    };
    (1..=4).map(lock).collect()
}

/// The number of requests that an embedded instance has refused.
async fn refusals(instance: &Instance, data: &Path) -> u64 {
    // The first one installs the crypto provider of this process.
    drop(instance.access());
    let request = reqwest::Client::new()
        .get(format!("{}/metrics", instance.admin))
        .bearer_auth(std::fs::read_to_string(data.join("admin-token")).unwrap());
    let metrics = request.send().await.unwrap().text().await.unwrap();
    let counts = metrics
        .lines()
        .filter(|line| line.starts_with("chat_errors_total{"));
    counts
        .map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
        .sum()
}

/// Shards that refuse and return, and an instance that is killed and started again, each while
/// texts wait in the page.
#[tokio::test(flavor = "multi_thread")]
async fn texts_keep_their_order_through_refusing_shards_and_killed_instances() {
    let folder = tempfile::tempdir().unwrap();
    let port = free_port();
    let address = format!("127.0.0.1:{port}");
    let settings = [
        ("LISTEN", address.as_str()),
        ("STORE__SEND_MS", "600"),
        ("LIMITS__SENDS_BURST", "1000"),
        ("LIMITS__SENDS_PER_SECOND", "1000"),
    ];
    let mut instance = Instance::start_embedded(folder.path(), &settings).await;
    let browser = Browser::start();
    let page = browser.client().await;
    sign_in(&page, &instance.url, 7).await;
    let mut rng = StdRng::seed_from_u64(seed());
    let texts: Vec<String> = (0..6).map(|n| format!("text {n}")).collect();
    let runs = order_runs();
    let (mut refused_sends, mut kills) = (0, 0);
    for run in 0..runs {
        open(&page, 100 + run).await;
        let at = rng.random_range(0..texts.len());
        for text in &texts[..at] {
            submit(&page, text).await;
        }
        let locked = (run % 2 == 0).then(|| locked_shards(folder.path()));
        let before = refusals(&instance, folder.path()).await;
        if locked.is_none() {
            instance.kill();
        }
        for text in &texts[at..] {
            submit(&page, text).await;
        }
        if let Some(locked) = locked {
            let refused = until("the page is refused", async || {
                let now = refusals(&instance, folder.path()).await;
                (now > before).then_some(now - before)
            })
            .await;
            drop(locked);
            refused_sends += refused;
        } else {
            instance = Instance::start_embedded(folder.path(), &settings).await;
            kills += 1;
        }
        until_page(
            &page,
            "document.querySelectorAll('#log li.pending').length === 0",
        )
        .await;
        let log = instance.api(7).await.log_upwards(100 + run).await.unwrap();
        let stored: Vec<String> = log.into_iter().map(|message| message.text).collect();
        assert_eq!(stored, texts, "run {run}");
    }
    println!("{runs} dialogs, {refused_sends} refused sends, {kills} kills");
    page.close().await.unwrap();
}
