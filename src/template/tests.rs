use super::*;

fn render(files: &[(&str, &str)], params: Option<Value>) -> Result<Manifests, Refusal> {
    let owner = Owner::Hand("uid".into());
    Templates::new("desks", files.iter().copied()).render(&Key::new("k1"), &owner, None, params.as_ref())
}

const VM: &str = "apiVersion: kubevirt.io/v1\nkind: VirtualMachine\nmetadata: {}\nspec: {}\n";

fn text(source: &str) -> Result<String, Fault> {
    render_text(source, &BTreeMap::from([("vm_name", "cyberdesk-k1".to_owned()), ("namespace", "desks".to_owned())]))
}

#[test]
fn only_our_own_variables_are_replaced() {
    let cases = [
        ("${vm_name}", "cyberdesk-k1"),
        ("a ${vm_name} in ${namespace}.", "a cyberdesk-k1 in desks."),
        ("$${vm_name}", "${vm_name}"),
        ("$HOME $(id) $$ {x} {{ jinja }} {% if %} \\{ \\", "$HOME $(id) $$ {x} {{ jinja }} {% if %} \\{ \\"),
        ("${HOME:-/root} ${a[@]} ${", "${HOME:-/root} ${a[@]} ${"),
        ("awk '{print $1}' ${namespace}\\", "awk '{print $1}' desks\\"),
        ("", ""),
    ];
    for (source, wanted) in cases {
        assert_eq!(text(source).expect(source), wanted);
    }
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
fn a_value_cannot_add_a_key() {
    let hostile = BTreeMap::from([("vm_name", "x\nevil: true".to_owned())]);
    let mut document = json!({ "name": "${vm_name}" });
    fill(&mut document, &hostile).expect("renders");
    assert_eq!(document, json!({ "name": "x\nevil: true" }));
}

#[test]
fn user_data_goes_into_a_secret_however_it_is_written() {
    let volume = |source: &str| {
        VM.replace("spec: {}", &format!("spec: {{template: {{spec: {{volumes: [{{name: c, {source}}}]}}}}}}"))
    };
    let inline = volume("cloudInitNoCloud: {userData: 'hello ${vm_name}'}");
    let encoded = volume("cloudInitConfigDrive: {userDataBase64: '${user_data_base64}'}");
    let cases = [
        (vec![("default.yaml", inline.as_str())], "cloudInitNoCloud", "hello cyberdesk-k1"),
        (
            vec![("default.yaml", encoded.as_str()), ("default.user-data", "I am ${cyberdesk_name}")],
            "cloudInitConfigDrive",
            "I am k1",
        ),
    ];
    for (files, source, wanted) in cases {
        let made = render(&files, None).expect(source);
        let volume = &made.vm["spec"]["template"]["spec"]["volumes"][0];
        assert_eq!(volume[source], json!({ "secretRef": { "name": "cyberdesk-uid-user-data" } }));
        assert_eq!(made.user_data, Some(BTreeMap::from([("userdata".to_owned(), wanted.as_bytes().to_vec())])));
    }
    let own = volume("cloudInitNoCloud: {secretRef: {name: theirs}}");
    assert_eq!(render(&[("default.yaml", &own)], None).expect("own secret").user_data, None);
}

#[test]
fn params_choose_a_template_and_nothing_else() {
    let files = [("default.yaml", VM), ("big.yaml", VM)];
    assert!(render(&files, Some(json!({ "template": "big" }))).is_ok());
    assert!(render(&files, Some(Value::Null)).is_ok());
    let cases = [
        (json!({ "template": "huge" }), "there is no template \"huge\"; there are: big, default"),
        (json!({ "cpus": 64 }), "takes no \"cpus\""),
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
fn what_would_take_the_vm_out_of_our_hands_is_refused() {
    let cases = [
        ("kind: Pod", "it must be a VirtualMachine"),
        ("a: [", "is not YAML"),
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
    let templates = Templates::built_in("desks");
    for name in templates.sources.keys() {
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
fn no_log_line_shows_user_data() {
    let volume = "spec: {template: {spec: {volumes: [{name: c, cloudInitNoCloud: {userData: geheim}}]}}}";
    let templates = Templates::new("desks", [("default.yaml", VM.replace("spec: {}", volume))]);
    let made = templates.render(&Key::new("k1"), &Owner::Hand("uid".into()), None, None).expect("renders");
    let shown = format!("{templates:?} {made:?}");
    assert!(shown.contains("default") && !shown.contains("geheim"), "{shown}");
}

proptest::proptest! {
    #[test]
    fn any_text_renders_or_is_refused_without_a_panic(source in "([a-z{}$\\\\ \n:]|\\$\\{|vm_name|\\}){0,40}") {
        let rendered = text(&source);
        if !source.contains("${") {
            proptest::prop_assert_eq!(rendered.expect("no variable in it"), source);
        }
    }
}
