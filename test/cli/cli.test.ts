import { existsSync, mkdirSync, readFileSync, readdirSync, writeFileSync, copyFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { openFile } from "../../src/io/files.node.ts";
import { encodeSafetensors, openSafetensors } from "../../src/io/safetensors.ts";
import { fixture, here, jsonLines, krait, withFolder } from "./krait.ts";

const text = readFileSync(new URL("../../README.md", import.meta.url), "utf8").repeat(2);
const small = ["--config", fixture("micro.json"), "--batch", "2", "--seqlen", "32", "--eval-rows", "4"];

describe("info and doctor", () => {
  test("info counts a published model exactly", async () => {
    const { code, stdout } = await krait(["info", "nemotron-3-nano-30b-a3b", "--json"]);
    expect(code).toBe(0);
    const facts = JSON.parse(stdout) as { parameters: { total: number }; checkpoint_tensors: number };
    expect(facts.parameters.total).toBe(31_577_940_288);
    expect(facts.checkpoint_tensors).toBe(6243);
  });

  test("doctor finds an adapter, tests and measures it", async () => {
    const { code, stdout } = await krait(["doctor", "--json"]);
    expect(code).toBe(0);
    const report = JSON.parse(stdout) as {
      chosen: string; adapters: { id: string }[]; checks: { passed: boolean }[]; copy_gb_per_s: number;
      matmul_gflop_per_s: number;
    };
    expect(report.adapters.map(({ id }) => id)).toContain(report.chosen);
    expect(report.checks.every(({ passed }) => passed)).toBe(true);
    expect(report.copy_gb_per_s).toBeGreaterThan(0);
    expect(report.matmul_gflop_per_s).toBeGreaterThan(0);
  });
});

describe("bench", () => {
  test("measures, says where, appends, and makes a page of it", () => withFolder(async (folder) => {
    const out = join(folder, "results", "here.jsonl");
    const args = ["bench", "overhead", "--runs", "1", "--json", "--out", out];
    const first = await krait(args);
    expect(first.code, first.stderr).toBe(0);
    await here(args);
    const lines = jsonLines(readFileSync(out, "utf8"));
    expect(lines).toHaveLength(2);
    expect(lines[0]).toEqual(jsonLines(first.stdout)[0]);
    expect(lines[0]).toMatchObject(
      { suite: "overhead", case: "replay_1000", runs: 1, node: process.version });
    for (const key of ["ms", "ratio"]) expect(lines[0]![key]).toBeGreaterThan(0);
    for (const key of ["adapter", "adapter_name", "krait", "date"]) expect(lines[0]![key]).toMatch(/./);

    const page = join(folder, "page.html");
    const report = await here(["bench", "report", "--results", join(folder, "results"), "--out", page]);
    expect(report.stdout).toContain(`1 results of ${lines[0]!["adapter"] as string}`);
    const data = /id="results">([\s\S]*?)<\/script>/.exec(readFileSync(page, "utf8"))![1]!;
    expect(JSON.parse(data)).toEqual([lines[1]]);
  }));

  test("layouts times a model's layouts against one rank, those that fit it", async () => {
    const { code, stderr, stdout } = await krait(["bench", "layouts", "--config", fixture("micro.json"),
      "--seqlen", "16", "--runs", "1", "--case", " pp=2", "--case", " tp=2", "--json"]);
    expect(code, stderr).toBe(0);
    const [line, ...more] = jsonLines(stdout);
    expect(more, "one group of heads cannot be cut").toEqual([]);
    expect(line).toMatchObject({
      case: `${fixture("micro.json")} pp=2`, world: 2, batch: 2, seqlen: 16, micro_batches: 2,
      hidden_size: 32,
    });
    for (const key of ["ms", "to_one_rank"]) expect(line![key]).toBeGreaterThan(0);
    expect(line!["loss_error"]).toBeLessThan(1e-5);
    // The same kernels for the same micro-batches, and an update for each of two stages.
    const { launches, launches_one_rank } = line as Record<"launches" | "launches_one_rank", number>;
    expect(launches / launches_one_rank).toBeGreaterThan(0.9);
    expect(launches / launches_one_rank).toBeLessThan(1.3);
  });

  test("says what it does not know", async () => {
    expect((await here(["bench", "kernel"])).stderr).toContain(
      "The suite must be one of ceilings, kernels,");
    expect((await here(["bench", "report", "train"])).stderr).toContain("runs no suite beside it");
    expect((await here(["bench", "report", "--results", fixture("micro.json")])).stderr)
      .toContain("a folder with .jsonl files, found");
  });
});

describe("train and generate", () => {
  test("a killed run resumes bit for bit, and speaks", () => withFolder(async (folder) => {
    const data = join(folder, "text.txt");
    writeFileSync(data, text);
    const args = (out: string) =>
      ["train", ...small, "--data", data, "--out", join(folder, out), "--seed", "3", "--json"];
    const whole = await here([...args("whole"), "--steps", "12"]);
    expect(whole.code, whole.stderr).toBe(0);
    const losses = jsonLines(whole.stdout).filter((line) => "grad_norm" in line)
      .map(({ step, loss }) => [step, loss]);
    expect(losses).toHaveLength(12);

    let lines = 0;
    const killed = await krait([...args("killed"), "--steps", "12", "--save-every", "4"], (piece, child) => {
      lines += piece.split("\n").length - 1;
      if (lines >= 6) child.kill("SIGKILL");
    });
    expect(killed.signal).toBe("SIGKILL");
    const resumed = await here([...args("killed"), "--resume"]);
    expect(resumed.code, resumed.stderr).toBe(0);
    const rest = jsonLines(resumed.stdout).filter((line) => "grad_norm" in line)
      .map(({ step, loss }) => [step, loss]);
    expect(rest[0]![0]).toBeGreaterThanOrEqual(4);
    expect(rest).toEqual(losses.slice(rest[0]![0] as number));
    const read = (run: string) =>
      readdirSync(join(folder, run)).filter((name) => name.startsWith("step-")).sort().at(-1)!;
    const weights = (run: string) => readFileSync(join(folder, run, read(run), "model.safetensors"));
    expect(weights("killed").equals(weights("whole"))).toBe(true);
    expect(existsSync(join(folder, "whole/loss.svg"))).toBe(true);
    expect(readFileSync(join(folder, "killed/metrics.jsonl"), "utf8").trim().split("\n").length)
      .toBeGreaterThanOrEqual(13);

    const words = (...more: string[]) => [
      "generate", "--model", join(folder, "whole"), "--prompt", "Krait ", "--max-tokens", "24", "--json",
      ...more,
    ];
    const speak = (...more: string[]) => here(words(...more));
    const plain = await krait(words());
    expect(plain.code, plain.stderr).toBe(0);
    const drafted = await speak("--draft", "2");
    const tokens = (run: { stdout: string }) => (JSON.parse(run.stdout) as { tokens: number[] }).tokens;
    expect(tokens(plain)).toHaveLength(24);
    expect(tokens(drafted)).toEqual(tokens(plain));
    const sampled = await Promise.all([
      speak("--temperature", "0.9", "--seed", "5"), speak("--temperature", "0.9", "--seed", "5"),
    ]);
    expect(tokens(sampled[0]!)).toEqual(tokens(sampled[1]!));
    const outside = await here(["generate", "--model", join(folder, "whole"), "--prompt-tokens", "7,260"]);
    expect(outside.code).toBe(1);
    expect(outside.stderr).toMatch(/Prompt token 1 must be from 0 to 259.*found 260/);
  }), 300_000);
});

describe("a run that blows up", () => {
  test("skips its steps, counts them, ends with a sentence and leaves the last checkpoint", () => withFolder(
    async (folder) => {
    const data = join(folder, "text.txt");
    writeFileSync(data, text);
    const out = join(folder, "run");
    const args = ["train", "--data", data, "--out", out, "--json"];
    const run = await here([
      ...args, ...small, "--save-every", "1", "--schedule", "constant", "--lr", "1e38", "--warmup", "0",
      "--steps", "9", "--max-skipped", "3",
    ]);
    expect(run.code).toBe(1);
    expect(run.stderr).toMatch(
      /^krait train: The loss at step 4 is NaN .*each of the last 3 steps was skipped.*after step 1;.*$/m);
    const steps = jsonLines(run.stdout).filter((line) => "grad_norm" in line);
    expect(steps.map(({ loss, skipped, skipped_steps }) => [loss === "NaN", skipped, skipped_steps])).toEqual(
      [[false, false, 0], [true, true, 1], [true, true, 2]]);
    const recorded = readFileSync(join(out, "metrics.jsonl"), "utf8");
    expect(recorded).toContain('"skipped":true,"skipped_steps":2');
    // The last checkpoint is of step 3, two skipped ones included, and knows it.
    const latest = readFileSync(join(out, "latest"), "utf8").trim();
    expect(JSON.parse(readFileSync(join(out, latest, "state.json"), "utf8"))).toMatchObject({
      steps: 3, skipped: { total: 2, in_a_row: 2 }, recipe: { max_skipped: 3 },
    });
    const again = await here([...args, "--resume", "--max-skipped", "5"]);
    expect(again.stderr).toMatch(/loss at step 6 is NaN .*each of the last 5 steps was skipped/);
  }), 120_000);
});

describe("other inputs", () => {
  test("jsonl, a tokenizer.json, accumulation and a trace", () => withFolder(async (folder) => {
    const [config, data, trace] = ["config.json", "lines.jsonl", "trace.json"].map(
      (name) => join(folder, name));
    writeFileSync(config!, readFileSync(fixture("micro.json"), "utf8")
      .replace('"vocab_size": 260', '"vocab_size": 1024').replace('"eos_token_id": 256',
        '"eos_token_id": 2'));
    const lines = text.split("\n").filter((line) => line.length > 40).map(
      (line) => JSON.stringify({ text: line }));
    writeFileSync(data!, `${lines.join("\n")}\n`);
    const out = join(folder, "run");
    const run = await here([
      "train", "--config", config!, "--tokenizer", fixture("tokenizer.json"), "--data", data!, "--out", out,
      "--steps", "2", "--batch", "2", "--seqlen", "32", "--accumulate", "2", "--schedule", "cosine",
        "--eval-rows", "2",
      "--trace", trace!, "--json",
    ]);
    expect(run.code, run.stderr).toBe(0);
    expect(jsonLines(run.stdout).filter((line) => "grad_norm" in line)).toHaveLength(2);
    const { traceEvents } = JSON.parse(readFileSync(trace!, "utf8")) as {
      traceEvents: { name: string; ph: string }[];
    };
    expect(traceEvents.filter(({ ph }) => ph === "X").map(({ name }) => name)).toContain("optim/adamw");
    const spoken = await here(
      ["generate", "--model", out, "--prompt", "Krait", "--max-tokens", "5", "--temperature", "1", "--json"]);
    expect(spoken.code, spoken.stderr).toBe(0);
    expect((JSON.parse(spoken.stdout) as { tokens: number[] }).tokens).toHaveLength(5);
  }), 120_000);
});

describe("logits", () => {
  test("writes what the golden set calls for", () => withFolder(async (folder) => {
    const model = fixture("golden/super_latent_mtp");
    const golden = await openSafetensors((await openFile(join(model, "golden.safetensors")))!);
    const inputs = ["input_ids", "labels"].map(async (name) => {
      const { shape } = golden.info(name);
      return { name, dtype: "I32" as const, shape, bytes: await golden.read(name) };
    });
    writeFileSync(join(folder, "in.safetensors"), await encodeSafetensors(await Promise.all(inputs)));
    const out = join(folder, "out.safetensors");
    const run = await krait([
      "logits", "--model", model, "--input", join(folder, "in.safetensors"), "--out", out,
      "--grads", "--decode", "7",
    ]);
    expect(run.code, run.stderr).toBe(0);
    const found = await openSafetensors((await openFile(out))!);
    const wanted = [...golden.tensors.keys()].filter((name) =>
      /^(logits|loss|decode\.logits|grad\..*|mtp\.(logits|loss|grad\..*))$/.test(name));
    expect(wanted.length).toBeGreaterThan(100);
    for (const name of wanted) {
      expect(found.info(name).shape, name).toEqual(golden.info(name).shape);
      const [a, b] = [await found.readTensorF32(name), await golden.readTensorF32(name)];
      const largest = b.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
      const error = a.reduce((most, x, i) => Math.max(most, Math.abs(x - b[i]!)), 0);
      expect(error, name).toBeLessThanOrEqual(1e-4 * largest);
    }
  }), 120_000);
});

describe("bad input is one sentence and an exit code", () => {
  const cases: [string, (folder: string) => string[], number, RegExp][] = [
    ["unknown layer letter", (f) => {
      const config = readFileSync(fixture("micro.json"), "utf8").replace("M*-E", "M*Q-E");
      writeFileSync(join(f, "c.json"), config);
      return ["info", join(f, "c.json")];
    }, 1, /position 2, found "Q"/],
    ["sizes that do not divide", (f) => {
      writeFileSync(
        join(f, "c.json"),
        readFileSync(fixture("micro.json"), "utf8").replace('"n_groups": 1', '"n_groups": 3'));
      return ["info", join(f, "c.json")];
    }, 1, /n_groups/],
    ["truncated checkpoint", (f) => {
      const whole = readFileSync(fixture("golden/mlp_only/model.safetensors"));
      mkdirSync(join(f, "m"));
      copyFileSync(fixture("golden/mlp_only/config.json"), join(f, "m/config.json"));
      writeFileSync(join(f, "m/model.safetensors"), whole.subarray(0, whole.length - 10));
      return ["generate", "--model", join(f, "m"), "--prompt-tokens", "1"];
    }, 1, /model\.safetensors/],
    ["missing tensor", (f) => {
      mkdirSync(join(f, "m"));
      writeFileSync(
        join(f, "m/config.json"),
        readFileSync(fixture("golden/mlp_only/config.json"), "utf8").replace('"-"', '"--"')
          .replace('"num_hidden_layers": 1', '"num_hidden_layers": 2'));
      copyFileSync(fixture("golden/mlp_only/model.safetensors"), join(f, "m/model.safetensors"));
      return ["generate", "--model", join(f, "m"), "--prompt-tokens", "1"];
    }, 1, /backbone\.layers\.1\.norm\.weight.*expected \[48\], found none/],
    ["empty data file", (f) => {
      writeFileSync(join(f, "empty.txt"), "");
      return ["train", ...small, "--data", join(f, "empty.txt"), "--out", join(f, "out"), "--steps", "1"];
    }, 1, /empty/],
    [
      "no such data", (f) => ["train", "--data", join(f, "nothing"), "--out", join(f, "out")], 2,
      /does not exist/,
    ],
    ["a model larger than the device", (f) => {
      writeFileSync(join(f, "text.txt"), text);
      return [
        "train", "--config", "nemotron-3-nano-30b-a3b", "--data", join(f, "text.txt"),
        "--out", join(f, "out"),
      ];
    }, 1, /larger than the device: backbone\.embeddings\.weight \[131072, 2688\]/],
    ["unknown adapter", () => ["doctor", "--adapter", "voodoo"], 1, /voodoo/],
  ];
  test.each(cases)("%s", (_, args, code, message) => withFolder(async (folder) => {
    const run = await here(args(folder));
    expect(run.code, run.stderr + run.stdout).toBe(code);
    expect(run.stderr + run.stdout).toMatch(message);
    expect(run.stderr).not.toMatch(/\n\s+at /); // no stack
    expect(existsSync(join(folder, "out"))).toBe(false);
  }));

  test("and the exit code is that of the process", async () => {
    const run = await krait(["train", "--stepz", "3"]);
    expect([run.code, run.stdout]).toEqual([2, ""]);
    expect(run.stderr).toMatch(/^krait train: .*--stepz.*--steps/);
  });
});
