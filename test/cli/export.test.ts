import { cpSync, existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { fixture, here, krait, withFolder } from "./krait.ts";

const model = fixture("golden/super_latent_mtp");

test("krait export megatron and back: the same tensors, with arguments and a script beside them", () =>
  withFolder(async (folder) => {
    const [out, back] = [join(folder, "megatron"), join(folder, "back")];
    const there = await krait([
      "export", "megatron", "--model", model, "--layout", "pp=2,dp=4,ep=4", "--out", out, "--json",
    ]);
    expect(there.code, there.stderr).toBe(0);
    expect(JSON.parse(there.stdout)).toMatchObject({ world: 8, files: 8 });
    const files = readdirSync(out);
    expect(files).toEqual(expect.arrayContaining(
      ["args.json", "megatron_args.sh", "convert_to_torch.py", "index.json", "config.json"]));
    const args = JSON.parse(readFileSync(join(out, "args.json"), "utf8")) as { arguments: string[][] };
    expect(args.arguments).toContainEqual(["--expert-model-parallel-size", "4"]);

    const again = await here(["export", "checkpoint", "--model", out, "--out", back]);
    expect(again.code, again.stderr).toBe(0);
    expect(readFileSync(join(back, "config.json"))).toEqual(readFileSync(join(model, "config.json")));
    const third = await here(
      ["export", "megatron", "--model", back, "--layout", "pp=2,dp=4,ep=4", "--out", join(folder, "3")]);
    expect(third.code, third.stderr).toBe(0);
    for (const file of files.filter((name) => name.endsWith(".safetensors"))) {
      expect(readFileSync(join(folder, "3", file)).equals(readFileSync(join(out, file))), file).toBe(true);
    }
  }));

test("a training checkpoint brings its batch, schedule and optimiser", () => withFolder(async (folder) => {
  const run = join(folder, "run");
  const step = join(run, "step-00000010");
  mkdirSync(run);
  cpSync(model, step, { recursive: true });
  writeFileSync(join(run, "latest"), "step-00000010\n");
  const recipe = { steps: 40, batch: 2, accumulate: 4, seqlen: 16, lr: 0.001, schedule: "cosine", decay: 0 };
  writeFileSync(join(step, "state.json"), JSON.stringify({ format: "krait-training-state", recipe }));
  const out = join(folder, "out");
  const { code, stderr } = await here(
    ["export", "megatron", "--model", run, "--layout", "dp=2,ep=2", "--out", out]);
  expect(code, stderr).toBe(0);
  const script = readFileSync(join(out, "megatron_args.sh"), "utf8");
  for (const line of [
    "--global-batch-size 8", "--micro-batch-size 2", "--lr 0.001", "--lr-decay-style cosine",
    "--train-iters 40", "--no-load-optim",
  ]) expect(script).toContain(`  ${line}\n`);
}));

test("wrong use is refused with one sentence and leaves nothing", () => withFolder(async (folder) => {
  const out = join(folder, "out");
  const cases: [string[], string][] = [
    [["megatron", "--model", model, "--out", out], "The option --layout is required for megatron."],
    [["megatron", "--model", model, "--layout", "tp=3", "--out", out], "breaks the rule \"tp divides"],
    [["megatron", "--model", model, "--layout", "tp=two", "--out", out], "The layout's tp must be a whole"],
    [["megatron", "--model", model, "--layout", "pp=2", "--out", folder], "must not exist yet, found a"],
    [["megatron", "--model", join(folder, "none"), "--layout", "pp=2", "--out", out], "does not exist"],
    [["nemo", "--model", model, "--out", out], "must be one of megatron, checkpoint, found \"nemo\""],
    [["checkpoint", "--model", model, "--out", out], "expected index.json, found no file"],
  ];
  for (const [args, message] of cases) {
    const { code, stderr } = await here(["export", ...args]);
    expect(code, args.join(" ")).toBeGreaterThan(0);
    expect(stderr.split("\n")[0]).toContain(message);
  }
  expect(existsSync(out)).toBe(false);
  expect(readdirSync(folder)).toEqual([]);
}));
