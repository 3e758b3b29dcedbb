/**
 * Tests what Parley is packed in: the JSR package, the Dockerfile, the units of
 * systemd and the rules of logrotate, by the programs that read them.
 */
import { assert, assertEquals, assertMatch } from "@std/assert";
import config from "../deno.json" with { type: "json" };
import {
  eventually,
  finished,
  Guest,
  installed,
  Lines,
  LINUX,
  within,
} from "../tests/helpers.ts";

const ROOT = new URL("..", import.meta.url).pathname;

/** A file of this folder. */
function packed(name: string): string {
  return Deno.readTextFileSync(`${ROOT}packaging/${name}`);
}

function program(name: string, ...args: string[]) {
  return finished(new Deno.Command(name, { args, cwd: ROOT }));
}

/** The files that main.ts imports, however it does, as paths below the root. */
async function importedFiles(): Promise<string[]> {
  const { output } = await program(
    Deno.execPath(),
    ...["info", "--quiet", "--json", "main.ts"],
  );
  const modules: { specifier: string }[] = JSON.parse(output).modules;
  const root = `file://${ROOT}`;
  return modules.map(({ specifier }) => specifier)
    .filter((specifier) => specifier.startsWith(root))
    .map((specifier) => specifier.slice(root.length));
}

const FOR_TESTS = /_test\.ts$|_bench\.ts$|^tests\/|test_helpers|^\./;

Deno.test("what is published is what main.ts imports, and what a user reads", async () => {
  const { code, errors } = await program(
    Deno.execPath(),
    ...["publish", "--dry-run", "--allow-dirty", "--no-check"],
  );
  assertEquals(code, 0, errors);
  const root = `file://${ROOT}`;
  const published = errors.split("\n").map((line) => line.trim())
    .filter((line) => line.startsWith(root))
    .map((line) => line.slice(root.length).replace(/ \(.*\)$/, ""));
  const expected = ["README.md", "CHANGELOG.md", "LICENSE"];
  for (const file of [...expected, ...await importedFiles()]) {
    assert(published.includes(file), `${file} is not published`);
  }
  assertEquals(published.filter((file) => FOR_TESTS.test(file)), []);
});

Deno.test("main.ts and deno.json alone have all their types", async () => {
  const folder = Deno.makeTempDirSync();
  for (const file of ["main.ts", "deno.json", "deno.lock"]) {
    Deno.copyFileSync(`${ROOT}${file}`, `${folder}/${file}`);
  }
  const { code, errors } = await program(
    Deno.execPath(),
    ...["check", "--config", `${folder}/deno.json`, `${folder}/main.ts`],
  );
  Deno.removeSync(folder, { recursive: true });
  assertEquals(code, 0, errors);
});

Deno.test("the changelog begins with the version in deno.json", () => {
  const changelog = Deno.readTextFileSync(`${ROOT}CHANGELOG.md`);
  const [, latest] = /^## (\S+)/m.exec(changelog)!;
  assertEquals(latest, config.version);
});

// -- Docker

Deno.test({
  name: "hadolint finds no fault in the Dockerfile",
  ignore: !installed("hadolint"),
  async fn() {
    const { code, output } = await program("hadolint", "packaging/Dockerfile");
    assertEquals([code, output], [0, ""]);
  },
});

Deno.test("the image has all that main.ts imports", async () => {
  const rules = packed("Dockerfile.dockerignore").split("\n");
  assertEquals(rules.find((rule) => !/^(#|$)/.test(rule)), "*");
  const included = rules.filter((rule) => rule.startsWith("!"))
    .map((rule) => rule.slice(1));
  const excluded = rules.filter((rule) => rule.endsWith(".ts"))
    .map((rule) => rule.replace(/^\*\*\/\*?/, ""))
    .filter((rule) => !rule.startsWith("!"));
  for (const file of ["deno.lock", ...await importedFiles()]) {
    const [top] = file.split("/");
    assert(included.includes(top), `${file} is not in the image`);
    assert(!excluded.some((end) => file.endsWith(end)), `${file} is left out`);
  }
});

Deno.test("the image has the version of Deno that CI tests", () => {
  const [, version] = /^FROM denoland\/deno:bin-(\S+)/m
    .exec(packed("Dockerfile"))!;
  const script = Deno.readTextFileSync(`${ROOT}.ci/run`);
  assert(script.includes(`deno@${version} task test`));
});

Deno.test("the health check of the image asks the web page", async () => {
  const [, json] = /^HEALTHCHECK .*CMD (\[[^]*?"\])$/m.exec(
    packed("Dockerfile").replaceAll("\\\n", ""),
  )!;
  const answers = [200, 503];
  await using page = Deno.serve(
    { hostname: "127.0.0.1", port: 0, onListen() {} },
    ({ url }) => {
      assertEquals(new URL(url).pathname, "/health");
      return new Response("ok", { status: answers.shift() });
    },
  );
  const [, ...args]: string[] = JSON.parse(
    json.replaceAll(":8080/", `:${page.addr.port}/`),
  );
  const check = async () => (await program(Deno.execPath(), ...args)).code;
  assertEquals(await check(), 0);
  assertEquals(await check(), 1);
  await page.shutdown();
  assertEquals(await check(), 1);
});

// -- systemd and logrotate

const UNITS = ["parley.service", "parley-console.socket"];

/** A copy of the units, in which Deno is where it is here. */
async function copyUnits(directory: string): Promise<string[]> {
  await Deno.mkdir(`${directory}/parley.service.d`);
  for (const unit of [...UNITS, "parley.service.d/console.conf"]) {
    const text = packed(unit)
      .replaceAll("/usr/local/bin/deno", Deno.execPath());
    await Deno.writeTextFile(`${directory}/${unit}`, text);
  }
  return UNITS.map((unit) => `${directory}/${unit}`);
}

Deno.test({
  name: "systemd-analyze finds no fault in the units",
  ignore: !installed("systemd-analyze"),
  async fn(test) {
    await using directory = await temporaryDirectory();
    const units = await copyUnits(directory.path);
    const { path } = directory;
    const analyze = async (...args: string[]) => {
      const { code, output, errors } = await program(
        "systemd-analyze",
        ...args,
      );
      assertEquals([code, errors], [0, ""], output);
    };
    await test.step("with the console", () => analyze("verify", ...units));
    await test.step("without it", async () => {
      await Deno.remove(`${path}/parley.service.d`, { recursive: true });
      await analyze("verify", units[0]);
    });
    // From 0, for nothing exposed, to 10: a unit without any of this has 9.
    await test.step("exposes less than 2 of 10", () =>
      analyze("security", "--offline=true", "--threshold=20", units[0]));
  },
});

/** The value of a setting of parley.service, its lines joined. */
function setting(name: string): string {
  const text = packed("parley.service").replaceAll("\\\n", "");
  return new RegExp(`^${name}=(.*)$`, "m").exec(text)![1];
}

/** Runs parley.service's command in a folder, without a terminal; bash runs
 * `before` first. */
async function startUnit(
  folder: string,
  { before = "", console = "" } = {},
) {
  const words = setting("ExecStart")
    .replace("/usr/local/bin/deno", Deno.execPath())
    .replace("/opt/parley/", ROOT)
    .replaceAll("/var/log/parley", folder)
    .replace("$PARLEY_CONSOLE", console)
    .replace("$PARLEY_OPTIONS", "--host 127.0.0.1 --port 0")
    .split(/ +/);
  const child = new Deno.Command("bash", {
    args: ["-c", `exec "$@" ${before}`, "bash", ...words],
    stdin: "null",
    stdout: "piped",
    stderr: "inherit",
    env: { NO_COLOR: "1" },
  }).spawn();
  const output = new Lines(child.stdout);
  const line = await output.find(/^Listening on /);
  const port = Number(/:(\d+)\. /.exec(line)![1]);
  return {
    child,
    port,
    output,
    async [Symbol.asyncDispose]() {
      child.kill("SIGTERM");
      const { code } = await within(child.status, "the exit");
      await output[Symbol.asyncDispose]();
      assertEquals(code, 0);
    },
  };
}

async function temporaryDirectory() {
  const path = await Deno.makeTempDir();
  return {
    path,
    async [Symbol.asyncDispose]() {
      await Deno.remove(path, { recursive: true });
    },
  };
}

Deno.test({
  name: "after logrotate, what is said is in the new log file",
  ignore: !installed("logrotate"),
  async fn() {
    await using directory = await temporaryDirectory();
    const folder = `${directory.path}/log`, log = `${folder}/chat.log`;
    await Deno.mkdir(folder, { mode: 0o750 });
    await using unit = await startUnit(folder);
    await using alice = await Guest.connect(unit.port);
    const says = async (line: string) => {
      await alice.say(line);
      const contains = async () => (await read(log)).endsWith(line + "\n");
      await eventually(contains, line);
    };
    await says("before");

    // Not by systemctl: that asks the systemd of this machine.
    const reload = setting("ExecReload").replace(
      "$MAINPID",
      `${unit.child.pid}`,
    );
    const isRoot = Deno.uid() === 0; // who may change the user
    const rules = packed("logrotate").replace("/var/log/parley", folder)
      .replace("systemctl reload parley.service", reload)
      .replace(/^\tsu .*$/m, isRoot ? "\tsu root root" : "");
    const path = `${directory.path}/rules`, state = `${directory.path}/state`;
    await Deno.writeTextFile(path, rules, { mode: 0o644 });
    const { code, errors } = await program(
      "logrotate",
      ...["--force", "--state", state, path],
    );
    assertEquals([code, errors], [0, ""]);
    await eventually(() => exists(log), "the new log file");
    await says("after");
    assertMatch(await read(`${log}.1`), /^\S+ \[guest1\] before\n$/);
    assertMatch(await read(log), /^\S+ \[guest1\] after\n$/);
    assertEquals((await Deno.stat(log)).mode! & 0o777, 0o600);
  },
});

function exists(path: string): Promise<boolean> {
  return Deno.stat(path).then(() => true, () => false);
}

async function read(path: string): Promise<string> {
  return await exists(path) ? await Deno.readTextFile(path) : "";
}

Deno.test({
  name: "the console reads what is written to its FIFO, time and again",
  ignore: !LINUX,
  async fn() {
    await using directory = await temporaryDirectory();
    const fifo = `${directory.path}/console`;
    assertEquals((await program("mkfifo", fifo)).code, 0);
    const [, option] = /^Environment=PARLEY_CONSOLE=(.*)$/m
      .exec(packed("parley.service.d/console.conf"))!;
    // As systemd opens it: to read and to write.
    await using unit = await startUnit(directory.path, {
      before: `0<>${fifo}`,
      console: option,
    });
    await using alice = await Guest.connect(unit.port);
    for (const line of ["first", "second"]) {
      await Deno.writeTextFile(fifo, line + "\n", { create: false });
      await alice.find(new RegExp(`^\\[host\\] ${line}$`));
    }
    await Deno.writeTextFile(fifo, "/who\n", { create: false });
    await unit.output.find(/^\* guest1 127\.0\.0\.1:/);
  },
});
