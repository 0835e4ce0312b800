use super::*;

fn render(files: &[(&str, &str)], params: Option<Value>) -> Result<Manifests, Refusal> {
    let owner = Owner::Hand("uid".into());
    Templates::new("desks", files.iter().copied()).render(&Key::new("k1"), &owner, None, params.as_ref())
}

/// What is wrong with a template that cannot be used.
fn fault(files: &[(&str, &str)]) -> String {
    Templates::new("desks", files.iter().copied()).faults().collect::<Vec<_>>().join("\n")
}

const VM: &str = "apiVersion: kubevirt.io/v1\nkind: VirtualMachine\nmetadata: {}\nspec: {}\n";

/// A VM with one cloud-init volume.
fn vm_with(source: &str) -> String {
    VM.replace("spec: {}", &format!("spec: {{template: {{spec: {{volumes: [{{name: c, {source}}}]}}}}}}"))
}

const TAKES_USER_DATA: &str = "cloudInitNoCloud: {userDataBase64: '${user_data_base64}'}";

/// Settings, then a VM.
fn with_settings(settings: &str, vm: &str) -> String {
    format!("{settings}\n---\n{vm}")
}

fn user_data(made: &Manifests) -> &str {
    let data = made.user_data.as_ref().and_then(|data| data.get("userdata")).expect("user data");
    std::str::from_utf8(data).expect("text")
}

#[test]
fn an_unknown_variable_is_named_with_its_place_and_the_nearest_known_one() {
    let refusal =
        render(&[("default.yaml", &VM.replace("spec: {}", "spec:\n  a: ${vm_nmae}"))], None).expect_err("unknown");
    assert_eq!(refusal.reason, Reason::BadTemplate);
    assert!(
        refusal.message.starts_with("default.yaml:5:6: unknown variable ${vm_nmae}; did you mean ${vm_name}?"),
        "{}",
        refusal.message
    );
}

#[test]
fn every_fault_of_a_template_is_told_with_its_file_and_place() {
    let vm = VM.replace("spec: {}", "spec:\n  ${vm_name}: 1\n  a: ${nothing}");
    let bad_params = "params:\n  properties:\n    cpu: {type: integer}\n    disk: {type: integr, default: 1}";
    let script = "#!/bin/sh\necho ${motd}\n";
    let motd = "params: {properties: {motd: {type: string, default: hi}}}";
    let cases: Vec<(Vec<(&str, String)>, &str)> = vec![
        (vec![("a.yaml", vm.clone())], "a.yaml:5:3: ${vm_name} stands in a key: keys are the template's own"),
        (vec![("a.yaml", vm)], "a.yaml:6:6: unknown variable ${nothing}"),
        (vec![("a.yaml", with_settings(bad_params, VM))], "a.yaml:3:5: params.cpu needs a default"),
        (vec![("a.yaml", with_settings(bad_params, VM))], "a.yaml:4:5: params.disk: an object would bring keys"),
        (vec![("a.yaml", with_settings("startDeadline: soon", VM))], "a.yaml:1:1: startDeadline is \"soon\""),
        (vec![("a.yaml", with_settings("streamUrl: not a url", VM))], "a.yaml:1:1: streamUrl becomes \"not a url\""),
        (
            vec![("a.yaml", with_settings("userData: hi", &vm_with(TAKES_USER_DATA))), ("a.user-data", "hi".into())],
            "user data comes from one place",
        ),
        (vec![("a.yaml", VM.into()), ("a.user-data", "hi".into())], "no volume takes the user data"),
        (vec![("a.yaml", vm_with(TAKES_USER_DATA))], "there is no user data for ${user_data_base64}"),
        (vec![("a.yaml", vm_with("cloudInitNoCloud: {userData: ''}"))], "cloud-init userData is empty"),
        (vec![("a.yaml", vm_with("cloudInitNoCloud: {userDataBase64: '%'}"))], "userDataBase64 is not base64"),
        (
            vec![("a.yaml", VM.replace("spec: {}", "spec: {a: '${user_data_base64}'}"))],
            "can only be all of userDataBase64",
        ),
        (
            vec![("a.yaml", with_settings(motd, &vm_with(TAKES_USER_DATA))), ("a.user-data", script.into())],
            "a.yaml:1:1: params.motd: it is put into user data that is not #cloud-config",
        ),
        (vec![("a.yaml", vm_with(TAKES_USER_DATA)), ("a.user-data", "#cloud-config\na: [\n".into())], "a.user-data:"),
        (
            vec![("a.yaml", vm_with(TAKES_USER_DATA)), ("a.user-data", "#cloud-config\na: ${vm_nam}\n".into())],
            "a.user-data:2:4: unknown variable ${vm_nam}; did you mean ${vm_name}?",
        ),
        (vec![("a.user-data", "hi".into())], "a.user-data has no a.yaml beside it"),
        (
            vec![("a.yaml", with_settings("userDataFrom: {secret: s}", &vm_with(TAKES_USER_DATA)))],
            "a.yaml:1:1: userDataFrom: there are no Secrets here",
        ),
    ];
    for (files, words) in cases {
        let files: Vec<(&str, &str)> = files.iter().map(|(name, text)| (*name, text.as_str())).collect();
        let fault = fault(&files);
        assert!(fault.contains(words), "{words:?} is not in {fault:?}");
    }
}

#[test]
fn one_bad_template_takes_no_other_along() {
    let files = [("default.yaml", VM), ("bad.yaml", "{{{")];
    assert!(render(&files, None).is_ok());
    let refusal = render(&files, Some(json!({ "template": "bad" }))).expect_err("bad");
    assert!(refusal.reason == Reason::BadTemplate && refusal.message.starts_with("bad.yaml:"), "{refusal:?}");
}

#[test]
fn user_data_goes_into_a_secret_however_it_is_written() {
    let cases = [
        (
            vec![("default.yaml", vm_with("cloudInitNoCloud: {userData: 'hello ${vm_name}'}"))],
            "cloudInitNoCloud",
            "hello cyberdesk-k1",
        ),
        (
            vec![
                ("default.yaml", vm_with("cloudInitConfigDrive: {userDataBase64: '${user_data_base64}'}")),
                ("default.user-data", "I am ${cyberdesk_name}".into()),
            ],
            "cloudInitConfigDrive",
            "I am k1",
        ),
        (
            vec![("default.yaml", with_settings("userData: I am ${cyberdesk_name}", &vm_with(TAKES_USER_DATA)))],
            "cloudInitNoCloud",
            "I am k1",
        ),
        (
            vec![("default.yaml", vm_with("cloudInitNoCloud: {userDataBase64: 'JHt2bV9uYW1lfQ=='}"))],
            "cloudInitNoCloud",
            "${vm_name}",
        ),
    ];
    for (files, source, wanted) in cases {
        let files: Vec<(&str, &str)> = files.iter().map(|(name, text)| (*name, text.as_str())).collect();
        let made = render(&files, None).expect(source);
        let volume = &made.vm["spec"]["template"]["spec"]["volumes"][0];
        assert_eq!(volume[source], json!({ "secretRef": { "name": "cyberdesk-uid-user-data" } }));
        assert_eq!(user_data(&made), wanted);
    }
    let own = vm_with("cloudInitNoCloud: {secretRef: {name: theirs}}");
    assert_eq!(render(&[("default.yaml", &own)], None).expect("own secret").user_data, None);
}

#[test]
fn user_data_from_a_secret_is_rendered_too() {
    let vm = with_settings("userDataFrom: {secret: s, key: k}", &vm_with(TAKES_USER_DATA));
    let secret = |key: &SecretKey| {
        if (key.secret.as_str(), key.key.as_str()) == ("s", "k") {
            Ok("I am ${vm_name}".to_owned())
        } else {
            Err(format!("{key:?}"))
        }
    };
    let templates = Templates::read("desks", &sources([("default.yaml", vm)]), secret);
    let made = templates.render(&Key::new("k1"), &Owner::Hand("uid".into()), None, None).expect("renders");
    assert_eq!(user_data(&made), "I am cyberdesk-k1");
}

#[test]
fn cloud_config_is_filled_as_yaml_and_otherwise_left_as_it_is() {
    let settings = "params: {properties: {motd: {type: string, default: hi}, keys: {type: array, items: {type: string}, default: []}}}";
    let vm = with_settings(settings, &vm_with(TAKES_USER_DATA));
    let render = |text: &str, params: Value| {
        let made = render(&[("default.yaml", &vm), ("default.user-data", text)], Some(params)).expect(text);
        user_data(&made).to_owned()
    };
    let verbatim = "#cloud-config\n# a comment\npermissions: 0644   # octal\n";
    assert_eq!(render(verbatim, json!({})), verbatim);

    let hostile = "x\nruncmd: [evil]\n- ${vm_name}: \"'#";
    let text =
        "#cloud-config\nhostname: ${vm_name}\nssh: ${keys}\nruncmd:\n  - [echo, '${motd}']\n  - |\n    echo ${motd}\n";
    let rendered = render(text, json!({ "motd": hostile, "keys": ["a", hostile] }));
    assert!(rendered.starts_with("#cloud-config\n"), "{rendered}");
    let parsed: Value = settings::yaml(&rendered).expect("YAML");
    let wanted = json!({
        "hostname": "cyberdesk-k1", "ssh": ["a", hostile],
        "runcmd": [["echo", hostile], format!("echo {hostile}\n")],
    });
    assert_eq!(parsed, wanted);
}

#[test]
fn what_is_not_cloud_config_takes_only_what_matches_its_pattern() {
    let settings = "params: {properties: {motd: {type: string, pattern: '[a-z ]*', default: hi}}}";
    let vm = with_settings(settings, &vm_with(TAKES_USER_DATA));
    let script = "#!/bin/sh\necho '${motd}' ${#x} $(id) {{ jinja }}\n";
    let files = [("default.yaml", vm.as_str()), ("default.user-data", script)];
    let made = render(&files, Some(json!({ "motd": "good day" }))).expect("renders");
    assert_eq!(user_data(&made), "#!/bin/sh\necho 'good day' ${#x} $(id) {{ jinja }}\n");
    let refusal = render(&files, Some(json!({ "motd": "'; rm -rf /; '" }))).expect_err("hostile");
    assert!(refusal.reason == Reason::BadParams && refusal.message.contains("params.motd must match"), "{refusal:?}");
}

#[test]
fn params_choose_a_template_and_what_it_offers() {
    let big = with_settings(
        "params: {properties: {cpu: {type: integer, maximum: 8, default: 2}}}",
        &VM.replace("spec: {}", "spec: {cores: '${cpu}', memory: '${params.cpu}Gi'}"),
    );
    let files = [("default.yaml", VM), ("big.yaml", big.as_str())];
    let made = render(&files, Some(json!({ "template": "big", "cpu": 4 }))).expect("renders");
    assert_eq!((&made.vm["spec"]["cores"], &made.vm["spec"]["memory"]), (&json!(4), &json!("4Gi")));
    assert!(render(&files, Some(Value::Null)).is_ok());
    let cases = [
        (json!({ "template": "huge" }), "there is no template \"huge\"; there are: big, default"),
        (json!({ "cpus": 64 }), "takes no \"cpus\""),
        (json!({ "template": "big", "cpu": 64 }), "params.cpu must be at most 8, not 64"),
        (json!({ "template": 5 }), "must be the name of a template"),
        (json!("big"), "params must be an object"),
    ];
    for (params, wanted) in cases {
        let refusal = render(&files, Some(params)).expect_err(wanted);
        assert_eq!(refusal.reason, Reason::BadParams);
        assert!(refusal.message.contains(wanted), "{}", refusal.message);
    }
}

#[test]
fn a_vm_carries_what_its_template_said_when_it_was_made() {
    let annotations = |text: &str, params| {
        let made = render(&[("default.yaml", text)], params).expect(text);
        let annotations = made.vm["metadata"]["annotations"].clone();
        [ANNOTATION_READY, ANNOTATION_START_DEADLINE, ANNOTATION_STREAM_URL].map(|name| annotations[name].clone())
    };
    assert_eq!(annotations(VM, None), [json!("vmi"), json!("600"), Value::Null]);
    let settings = "ready: agent\nstartDeadline: 20m\nstreamUrl: https://d.example/${cyberdesk_name}?q=${q}\nparams: {properties: {q: {type: string, default: a}}}";
    let all = with_settings(settings, VM);
    let hostile = json!({ "q": "a&b=../é" });
    assert_eq!(
        annotations(&all, Some(hostile)),
        [json!("agent"), json!("1200"), json!("https://d.example/k1?q=a%26b%3D..%2F%C3%A9")]
    );
    let by_hand = VM.replace("metadata: {}", "metadata: {annotations: {cyberdesk.io/start-deadline: '5'}}");
    assert_eq!(annotations(&by_hand, None)[1], json!("5"), "what the VM says itself stays");
    assert_eq!(annotations(&with_settings("startDeadline: 1m", &by_hand), None)[1], json!("60"));
}

#[test]
fn what_would_take_the_vm_out_of_our_hands_is_refused() {
    let cases = [
        ("kind: Pod", "it must be a VirtualMachine"),
        ("a: [", "default.yaml:"),
        ("just text", "it must be a VirtualMachine"),
        (
            "{apiVersion: kubevirt.io/v1, kind: VirtualMachine, metadata: {finalizers: [a]}}",
            "metadata.finalizers is not allowed",
        ),
        ("{apiVersion: kubevirt.io/v1, kind: VirtualMachine, metadata: 5}", "metadata must be an object"),
    ];
    for (yaml, wanted) in cases {
        let refusal = render(&[("default.yaml", yaml)], None).expect_err(wanted);
        assert!(refusal.message.contains(wanted), "{}", refusal.message);
    }
}

#[test]
fn the_templates_that_ship_render_and_carry_the_owner_s_mark() {
    let owner = Owner::Row(Uuid::from_u128(1));
    let templates = Templates::read("desks", &built_in(), |key| Err(format!("{key:?}")));
    for name in built_in().keys() {
        let made = templates.render(&Key::new("k1"), &owner, None, Some(&json!({ "template": name }))).expect(name);
        assert!(made.user_data.is_some(), "{name}");
        for path in ["/metadata/labels", "/spec/template/metadata/labels"] {
            let labels = made.vm.pointer(path).expect(path).clone();
            let meta =
                kube::api::ObjectMeta { labels: serde_json::from_value(labels).expect(path), ..Default::default() };
            assert_eq!(Owner::of(&meta).as_ref(), Some(&owner), "{name}{path}");
        }
    }
}

#[test]
fn files_sort_into_templates_and_back() {
    let shipped = files(&built_in());
    assert_eq!(files(&sources(shipped.clone())), shipped);
    assert!(shipped.contains_key("default.user-data"));
}

#[test]
fn no_log_line_shows_user_data() {
    let templates = Templates::new("desks", [("default.yaml", vm_with("cloudInitNoCloud: {userData: geheim}"))]);
    let made = templates.render(&Key::new("k1"), &Owner::Hand("uid".into()), None, None).expect("renders");
    let shown = format!("{templates:?} {made:?}");
    assert!(shown.contains("default") && !shown.contains("geheim"), "{shown}");
}

/// People copy what the documentation shows.
#[test]
fn the_documentation_s_settings_and_messages_are_so() {
    let page = include_str!("../../docs/templates.md");
    let yaml =
        |from: &str| page.split(from).nth(1).and_then(|rest| rest.split("\n```").next()).expect("is in the page");
    let settings = format!("params:{}", yaml("```yaml\nparams:")).split("\n---").next().map(str::to_owned);
    let default = with_settings(&settings.expect("settings"), VM);
    let render = |params: Value| render(&[("default.yaml", &default)], Some(params));
    assert!(render(json!({ "image": "debian:13" })).is_ok(), "{}", fault(&[("default.yaml", &default)]));
    let rows: Vec<&str> = page.lines().filter(|line| line.starts_with("| `{")).collect();
    assert_eq!(rows.len(), 4);
    for row in rows {
        let cells: Vec<&str> = row.split('`').collect();
        let mut params: Value = serde_json::from_str(cells[1]).expect("JSON");
        if cells[1] != "{}" {
            params["image"] = "debian:13".into();
        }
        assert_eq!(render(params).expect_err(row).message, cells[3]);
    }
    let whole = with_settings(&format!("userData: |{}", yaml("userData: |")), &vm_with(TAKES_USER_DATA));
    assert_eq!(fault(&[("default.yaml", &whole)]), "");
}

mod properties {
    use proptest::prelude::*;

    use super::*;

    /// A document whose strings are full of what has a meaning to somebody.
    fn documents() -> impl Strategy<Value = Value> {
        let text =
            "([a-z]|\\$|\\{|\\}|\\$\\{vm_name\\}|\\$\\{a\\}|\\$\\{params.b\\}|\\$\\$\\{a\\}|'|\"|#|: |\n|\\\\|é){0,8}";
        let leaf = prop_oneof![
            text.prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<bool>().prop_map(Value::from),
            Just(Value::Null)
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("[a-z]{1,4}", inner, 0..4)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        })
    }

    /// Anything that a row can hold.
    fn params() -> impl Strategy<Value = Value> {
        let value = prop_oneof![
            any::<String>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            "[ -~\n\r\t\u{80}-\u{a0}\u{feff}\u{2028}]{0,20}".prop_map(Value::from),
            prop::collection::vec(any::<String>(), 0..3).prop_map(Value::from),
            documents(),
        ];
        (value.clone(), value).prop_map(|(a, b)| json!({ "a": a, "b": b }))
    }

    /// All paths of a document that end in a key, lists counted by their place.
    fn keys(value: &Value, path: &str, into: &mut BTreeSet<String>) {
        match value {
            Value::Object(fields) => fields.iter().for_each(|(key, field)| {
                into.insert(format!("{path}/{key}"));
                keys(field, &format!("{path}/{key}"), into);
            }),
            Value::Array(items) => {
                items.iter().enumerate().for_each(|(at, item)| keys(item, &format!("{path}/{at}"), into));
            }
            _ => (),
        }
    }

    fn keys_of(value: &Value) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        keys(value, "", &mut found);
        found
    }

    const ANYTHING: &str = "params: {properties: {
        a: {type: [string, integer, number, boolean, 'null', array], items: {type: [string, integer, number, boolean, 'null']}, default: x},
        b: {type: [string, integer, number, boolean, 'null', array], items: {type: [string, integer, number, boolean, 'null']}, default: y}}}";

    proptest! {
        #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

        #[test]
        fn any_template_and_params_render_to_the_template_s_own_keys_or_are_refused(
            document in documents(), cloud_config in documents(), params in params(),
        ) {
            let vm = json!({
                "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": {},
                "spec": { "any": document, "template": { "spec": { "volumes": [
                    { "name": "c", "cloudInitNoCloud": { "userDataBase64": "${user_data_base64}" } }] } } },
            });
            let text = with_settings(ANYTHING, &serde_saphyr::to_string(&vm).expect("YAML"));
            let cloud_config = json!({ "any": cloud_config });
            let user_text = format!("#cloud-config\n{}", serde_saphyr::to_string(&cloud_config).expect("YAML"));
            let files = [("default.yaml", text.as_str()), ("default.user-data", user_text.as_str())];
            if let Ok(made) = render(&files, Some(params)) {
                prop_assert_eq!(keys_of(&made.vm["spec"]["any"]), keys_of(&vm["spec"]["any"]));
                let again: Value = settings::yaml(&serde_saphyr::to_string(&made.vm).expect("YAML")).expect("parses");
                prop_assert_eq!(&again, &made.vm);
                let parsed: Value = settings::yaml(user_data(&made)).expect("parses");
                prop_assert_eq!(keys_of(&parsed), keys_of(&cloud_config));
            }
        }

        #[test]
        fn any_text_at_all_is_read_or_refused_without_a_panic(
            vm in "([a-z:{}\\[\\]$'\"#| \n-]|---\n|\\$\\{|params|properties|kind: VirtualMachine\n){0,60}", user_text in any::<String>(), params in params(),
        ) {
            let _ = render(&[("default.yaml", &vm), ("default.user-data", &user_text)], Some(params.clone()));
            let whole = with_settings(ANYTHING, &vm_with(TAKES_USER_DATA));
            let _ = render(&[("default.yaml", &whole), ("default.user-data", &user_text)], Some(params));
        }
    }
}
