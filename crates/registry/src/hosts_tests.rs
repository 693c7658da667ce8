use super::*;

fn load_file(registry: &str, directory: &str, text: &str) -> Vec<HostConfig> {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join(directory);
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join(FILE), text).unwrap();
    let hosts = load(Some(root.path()), registry).unwrap().hosts;
    hosts
        .into_iter()
        .map(|mut host| {
            let relative = |path: &mut PathBuf| *path = path.strip_prefix(&dir).unwrap_or(path).to_owned();
            host.tls.ca.iter_mut().for_each(relative);
            host.tls.client.iter_mut().for_each(|(cert, key)| {
                relative(cert);
                key.iter_mut().for_each(relative);
            });
            host
        })
        .collect()
}

fn bases(hosts: &[HostConfig]) -> Vec<&str> {
    hosts.iter().map(|host| host.base.as_str()).collect()
}

#[test]
fn without_a_file_the_registry_itself_is_asked() {
    for (registry, base, skip_verify) in [
        ("docker.io", "https://registry-1.docker.io/v2", false),
        ("ghcr.io", "https://ghcr.io/v2", false),
        ("registry.example:5000", "https://registry.example:5000/v2", false),
        ("localhost", "https://localhost/v2", true),
        ("localhost:443", "https://localhost/v2", true),
        ("localhost:80", "http://localhost/v2", false),
        ("127.0.0.1:5000", "http://127.0.0.1:5000/v2", false),
        ("10.0.0.1:5000", "https://10.0.0.1:5000/v2", false),
        ("localhost.example:5000", "https://localhost.example:5000/v2", false),
    ] {
        let hosts = load(None, registry).unwrap().hosts;
        assert_eq!(bases(&hosts), [base]);
        assert_eq!(hosts[0].tls.skip_verify, skip_verify, "{registry}");
        assert!(hosts[0].pull && hosts[0].resolve && !hosts[0].mirror);
    }
}

#[test]
fn hosts_come_in_the_order_of_the_file_and_the_server_last() {
    let text = r#"
        server = "https://registry-1.docker.io"
        [host."https://zzz.example"]
          capabilities = ["pull"]
        [host."http://127.0.0.1:5000/proxy/"]
          override_path = true
          capabilities = ["Pull", "resolve"]
        [host."mmm.example/some/path"]
          [host."mmm.example/some/path".header]
            x-team = "a"
            authorization = ["Basic one", "Basic two"]
        [host."https://aaa.example/v2"]
          dial_timeout = "1m3s"
          skip_verify = true
    "#;
    let hosts = load_file("docker.io", "docker.io", text);
    assert_eq!(
        bases(&hosts),
        [
            "https://zzz.example/v2",
            "http://127.0.0.1:5000/proxy",
            "https://mmm.example/some/path/v2",
            "https://aaa.example/v2",
            "https://registry-1.docker.io/v2",
        ]
    );
    let mirrors: Vec<bool> = hosts.iter().map(|host| host.mirror).collect();
    assert_eq!(mirrors, [true, true, true, true, false]);
    let resolve: Vec<bool> = hosts.iter().map(|host| host.resolve).collect();
    assert_eq!(resolve, [false, true, true, true, true]);
    assert_eq!(hosts[2].headers.get_all("authorization").iter().count(), 2);
    assert!(!format!("{:?}", hosts[2].headers).contains("one"), "header values are secrets");
    assert_eq!(hosts[3].connect_timeout, Some(Duration::from_secs(63)));
    assert!(hosts[3].tls.skip_verify && !hosts[0].tls.skip_verify);
}

#[test]
fn a_file_without_server_ends_with_the_registry_and_its_tls_settings() {
    let text = "ca = \"root.pem\"\nclient = [[\"a.pem\", \"a.key\"], [\"b.pem\", \"/abs/b.key\"]]\n[host.\"https://m.example\"]\nca = [\"1.pem\", \"2.pem\"]\nclient = \"both.pem\"";
    let hosts = load_file("r.example:5000", "r.example_5000_", text);
    assert_eq!(bases(&hosts), ["https://m.example/v2", "https://r.example:5000/v2"]);
    assert_eq!(hosts[0].tls.ca, [PathBuf::from("1.pem"), PathBuf::from("2.pem")]);
    assert_eq!(hosts[0].tls.client, [(PathBuf::from("both.pem"), None)]);
    assert_eq!(hosts[1].tls.ca, [PathBuf::from("root.pem")]);
    assert_eq!(hosts[1].tls.client[1], (PathBuf::from("b.pem"), Some(PathBuf::from("/abs/b.key"))));
}

#[test]
fn directories_are_tried_from_the_exact_to_the_default() {
    let root = tempfile::tempdir().unwrap();
    let loaded = || load(Some(root.path()), "r.example:5000").unwrap().hosts[0].base.to_string();
    assert_eq!(loaded(), "https://r.example:5000/v2");
    for name in ["_default", "r.example:5000", "r.example_5000_"] {
        let dir = root.path().join(name);
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join(FILE), format!("server = \"https://{}.example\"", name.len())).unwrap();
        assert_eq!(loaded(), format!("https://{}.example/v2", name.len()));
    }
}

#[test]
fn a_file_nobody_understands_is_passed_over() {
    for text in ["server = [", "[host.\"https://a\"]\ncapabilities = [\"fly\"]", "[host.\"ftp://a\"]\n", "ca = 7"] {
        assert_eq!(bases(&load_file("r.example", "r.example", text)), ["https://r.example/v2"], "{text}");
    }
}

#[test]
fn what_is_wrong_with_a_file_is_told_without_its_text() {
    for (text, line) in [
        ("server = \"https://a\"\n[header]\nauthorization = \"Basic hunter2\nx = 1", "line 3"),
        ("\nheader = \"hunter2\"", "wrong type"),
        ("skip_verify = \"hunter2\"", "wrong type"),
        ("[host.\"https://ann:hunter2@\"]", "host"),
        ("server = \"ftp://ann:hunter2@a\"", "host"),
    ] {
        let error = parse(text, Path::new("/")).err().unwrap();
        assert!(error.contains(line) && !error.contains("hunter2"), "{error}");
    }
}

#[test]
fn more_headers_than_a_request_can_have_are_refused_without_panic() {
    let names: String = (0..40_000).map(|number| format!("x-{number} = \"\"\n")).collect();
    let text = format!("[host.\"https://a.example\".header]\n{names}");
    assert!(text.len() < 1 << 20, "a file of that size is read");
    assert_eq!(parse(&text, Path::new("/")).err().as_deref(), Some("there are too many headers"));
}

#[test]
fn certificate_files_serve_without_a_hosts_file() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("r.example");
    std::fs::create_dir(&dir).unwrap();
    for name in ["ca.crt", "me.cert", "me.key", "README"] {
        std::fs::write(dir.join(name), "x").unwrap();
    }
    let hosts = load(Some(root.path()), "r.example").unwrap().hosts;
    assert_eq!(bases(&hosts), ["https://r.example/v2"]);
    assert_eq!(hosts[0].tls.ca, [dir.join("ca.crt")]);
    assert_eq!(hosts[0].tls.client, [(dir.join("me.cert"), Some(dir.join("me.key")))]);
}

#[test]
fn the_stamp_changes_with_any_file_that_decides() {
    let root = tempfile::tempdir().unwrap();
    let now = || load(Some(root.path()), "r.example").unwrap().stamp;
    let nothing = now();
    assert_eq!(nothing, stamp(nothing.iter().map(|(path, _)| path.clone())));
    let dir = root.path().join("r.example");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join(FILE), "ca = \"ca.pem\"").unwrap();
    let file = now();
    assert_ne!(nothing, stamp(nothing.iter().map(|(path, _)| path.clone())));
    std::fs::write(dir.join("ca.pem"), "new").unwrap();
    assert_ne!(file, stamp(file.iter().map(|(path, _)| path.clone())));
}

#[test]
fn registries_of_a_host_are_found_by_their_directories() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["a.example", "a.example:5000", "a.example_5001_", "a.example_x_", "a.example.com", "_default", "b:1"] {
        std::fs::create_dir(dir.path().join(name)).unwrap();
    }
    assert_eq!(registries_at(dir.path(), "a.example"), ["a.example", "a.example:5000", "a.example:5001"]);
    assert!(registries_at(dir.path(), "c").is_empty());
    assert!(registries_at(&dir.path().join("nonexistent"), "b").is_empty());
}
