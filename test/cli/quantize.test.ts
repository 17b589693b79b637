import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { openFile } from "../../src/io/files.node.ts";
import { openSafetensors } from "../../src/io/safetensors.ts";
import { fixture, here, jsonLines, krait, withFolder } from "./krait.ts";

const text = readFileSync(new URL("../../docs/architecture.md", import.meta.url), "utf8");

interface Summary {
  readonly layers: { module: string; format: string; weight_error: number; output_error: number }[];
  readonly bits_per_quantised_weight: number;
  readonly bytes_per_weight: number;
  readonly perplexity_before: number;
  readonly perplexity_after: number;
}

/** A small model, trained for a moment, and text; every width is a multiple of 16. */
async function prepare(folder: string): Promise<{ model: string; calib: string }> {
  writeFileSync(
    join(folder, "config.json"), readFileSync(fixture("micro.json"), "utf8")
      .replace('"moe_intermediate_size": 24', '"moe_intermediate_size": 32').replace("M*-E", "M-*E"));
  const calib = join(folder, "text.txt");
  writeFileSync(calib, text.slice(0, 9000));
  const model = join(folder, "run");
  const { code, stderr } = await here([
    "train", "--config", join(folder, "config.json"), "--data", calib, "--out", model, "--steps", "4",
    "--batch", "2", "--seqlen", "32", "--eval-rows", "1",
  ]);
  expect(code, stderr).toBe(0);
  return { model, calib };
}

const E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6];
const e4m3 = (byte: number) => {
  const [sign, field, fraction] = [byte >> 7 ? -1 : 1, (byte >> 3) & 15, byte & 7];
  return sign * (field === 0 ? fraction / 512 : (1 + fraction / 8) * 2 ** (field - 7));
};

test("a checkpoint is quantised, says what it lost, and is read by others and by us", () => withFolder(
  async (folder) => {
  const { model, calib } = await prepare(folder);
  const step = join(model, readdirSync(model).find((name) => name.startsWith("step-"))!);
  writeFileSync(join(step, "tokenizer_config.json"), "{}");
  const words = (out: string, ...more: string[]) => [
    "quantize", "--model", model, "--calib", calib, "--out", join(folder, out), "--seqlen", "64",
    "--samples", "4", ...more,
  ];
  const quantize = (out: string, ...more: string[]) => here(words(out, ...more));
  const four = await krait(
    words("four", "--format", "nvfp4", "--method", "mse", "--kv-cache", "fp8", "--json"));
  expect(four.code, four.stderr).toBe(0);
  const summary = JSON.parse(four.stdout) as Summary;
  expect(summary.layers.map(({ module }) => module)).toContain("backbone.layers.0.mixer.in_proj");
  expect(summary.bits_per_quantised_weight).toBeGreaterThan(4.5);
  expect(summary.bits_per_quantised_weight).toBeLessThan(4.7);
  expect(Math.abs(summary.perplexity_after / summary.perplexity_before - 1)).toBeLessThan(0.05);
  expect(readdirSync(join(folder, "four")).toSorted()).toEqual([
    "config.json", "hf_quant_config.json", "model.safetensors", "tokenizer_config.json",
  ]);
  const metadata = JSON.parse(readFileSync(join(folder, "four/hf_quant_config.json"), "utf8")) as {
    quantization: { quant_algo: string; exclude_modules: string[] };
  };
  expect(metadata.quantization.quant_algo).toBe("NVFP4");
  expect(metadata.quantization.exclude_modules).toContain("lm_head");

  // Decoded by hand, the values are those that the source was rounded to.
  const open = async (path: string) => openSafetensors((await openFile(path))!);
  const source = await open(join(step, "model.safetensors"));
  const written = await open(join(folder, "four/model.safetensors"));
  const layer = summary.layers.find(({ module }) => module === "backbone.layers.1.mixer.down_proj")!;
  const codes = await written.read(`${layer.module}.weight`);
  const scales = await written.read(`${layer.module}.weight_scale`);
  const global = (await written.readTensorF32(`${layer.module}.weight_scale_2`))[0]!;
  const weights = await source.readTensorF32(`${layer.module}.weight`);
  let [lost, whole] = [0, 0];
  weights.forEach((weight, i) => {
    const code = (codes[i >> 1]! >> (i % 2 === 0 ? 0 : 4)) & 15;
    const value = (code & 8 ? -1 : 1) * E2M1[code & 7]! * e4m3(scales[i >> 4]!) * global;
    lost += (weight - value) ** 2;
    whole += weight ** 2;
  });
  expect(Math.sqrt(lost / whole)).toBeCloseTo(layer.weight_error, 6);
  expect(global).toBeCloseTo(weights.reduce((most, x) => Math.max(most, Math.abs(x)), 0) / 2688, 10);
  await source.close();
  await written.close();

  const spoken = await here([
    "generate", "--model", join(folder, "four"), "--prompt", "Krait", "--max-tokens", "4", "--json",
  ]);
  expect(spoken.code, spoken.stderr).toBe(0);
  const said = JSON.parse(spoken.stdout) as { tokens: number[]; kv_cache: string };
  expect([said.tokens.length, said.kv_cache]).toEqual([4, "fp8"]);

  const shown = await here(["info", join(folder, "four"), "--json"]);
  expect(JSON.parse(shown.stdout)).toMatchObject({
    stored: { metadata: "NVFP4", kv_cache: "fp8", bytes: expect.any(Number) as number },
  });
  const { parts } = (JSON.parse(shown.stdout) as { stored: { parts: { format: string; tensors: number }[] } })
    .stored;
  expect(parts.find(({ format }) => format === "nvfp4")!.tensors).toBe(summary.layers.length);

  const mixed = await quantize("mixed", "--format", "mixed", "--bits", "7", "--exclude", "*.nothing");
  expect(mixed.code, mixed.stderr).toBe(0);
  expect(mixed.stderr).toContain("--exclude *.nothing matches no module");
  for (const word of ["nvfp4", "fp8", "bytes per weight", "perplexity",
    "backbone.layers.3.mixer.experts.*.up_proj (4)"]) {
    expect(mixed.stdout).toContain(word);
  }
  const again = await quantize("again", "--format", "fp8", "--model", join(folder, "four"));
  expect([again.code, again.stderr]).toEqual(
    [2, expect.stringMatching(/quantised already: expected floats.*nvfp4/)]);
  const taken = await quantize("four", "--format", "fp8");
  expect([taken.code, taken.stderr]).toEqual(
    [2, expect.stringMatching(/must not exist yet, found a folder/)]);
  expect(readdirSync(folder).filter((name) => name.includes("tmp") || name === "again")).toEqual([]);
}), 300_000);

test("bench formats decodes one model from bf16, FP8 and NVFP4 checkpoints", async () => {
  const run = await here(["bench", "formats", "--config", fixture("micro.json"), "--runs", "2", "--json"]);
  expect(run.code, run.stderr).toBe(0);
  const lines = jsonLines(run.stdout).filter(({ suite }) => suite === "formats");
  expect(lines.map((line) => line["case"])).toEqual(
    ["decode_micro_bf16", "decode_micro_fp8", "decode_micro_nvfp4"]);
  for (const key of ["bytes_per_weight", "device_bytes_per_weight"]) {
    const bytes = lines.map((line) => line[key] as number);
    expect(bytes).toEqual(bytes.toSorted((a, b) => b - a));
    expect(new Set(bytes).size).toBe(3);
  }
  expect(lines.every(({ rate, runs }) => (rate as number) > 0 && runs === 2)).toBe(true);
}, 60_000);

describe("bad input is one sentence and an exit code", () => {
  const cases: [string, string[], string, RegExp][] = [
    ["an unknown format", ["--format", "fp6"], text,
      /--format must be one of fp8, mxfp8, nvfp4, mixed, found "fp6"/],
    ["an unknown method", ["--format", "fp8", "--method", "gptq"], text,
      /--method must be one of max, mse, awq/],
    ["a budget without mixed", ["--format", "fp8", "--bits", "6"], text, /--bits belongs to --format mixed/],
    ["mixed without a budget", ["--format", "mixed"], text, /needs a budget/],
    ["a budget below the smallest", ["--format", "mixed", "--bits", "3"], text,
      /budget must be from .* found 3/],
    ["a budget above the largest", ["--format", "mixed", "--bits", "17"], text,
      /budget must be from .* found 17/],
    ["no text", ["--format", "fp8"], "", /text\.txt holds no text/],
    ["too little text", ["--format", "fp8"], "short", /holds 6 tokens, expected at least 33/],
    ["blocks that do not divide", ["--format", "nvfp4"], text,
      /experts\.0\.down_proj must have rows of whole nvfp4 blocks of 16 weights, found \[16, 24\]/],
    ["everything excluded", ["--format", "fp8", "--exclude", "*"], text,
      /Every matrix of the model is excluded/],
  ];
  test("of every kind", () => withFolder(async (folder) => {
    writeFileSync(join(folder, "config.json"), readFileSync(fixture("micro.json")));
    writeFileSync(join(folder, "train.txt"), text);
    const trained = await here([
      "train", "--config", join(folder, "config.json"), "--data", join(folder, "train.txt"), "--steps", "1",
      "--batch", "1", "--seqlen", "16", "--eval-rows", "1", "--out", join(folder, "run"),
    ]);
    expect(trained.code, trained.stderr).toBe(0);
    for (const [name, args, content, message] of cases) {
      writeFileSync(join(folder, "text.txt"), content);
      const run = await here([
        "quantize", "--model", join(folder, "run"), "--calib", join(folder, "text.txt"), "--seqlen", "32",
        "--samples", "2", "--out", join(folder, "out"), ...args,
      ]);
      expect(run.code, `${name}: ${run.stdout}`).toBeGreaterThan(0);
      expect(run.stderr, name).toMatch(message);
      expect(run.stderr, name).not.toMatch(/\n\s+at /); // no stack
      expect(readdirSync(folder).filter((each) => each.startsWith("out")), name).toEqual([]);
    }
  }), 120_000);
});
