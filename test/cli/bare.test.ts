/** Commands that compute, on an adapter that offers no more than WebGPU guarantees. */
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { fixture, here, jsonLines, krait, withFolder } from "./krait.ts";

const bare = (folder: string) => (
  { KRAIT_LIMITS: "default", KRAIT_TUNER: "", KRAIT_CACHE: join(folder, "cache") });

/** The smallest model, of one kind of block: every kernel more is seconds of compiling on SwiftShader. */
function writeConfig(folder: string): string {
  const config = JSON.parse(readFileSync(fixture("micro.json"), "utf8").replace("Infinity", "1e9")) as object;
  const file = join(folder, "mamba.json");
  const blocks = { hybrid_override_pattern: "M", num_nextn_predict_layers: 0 };
  writeFileSync(file, JSON.stringify({ ...config, ...blocks }));
  return file;
}

test("training and generating work, and agree with the whole adapter", () => withFolder(async (folder) => {
  const config = writeConfig(folder);
  const data = join(folder, "text.txt");
  writeFileSync(data, "A text to train on. ".repeat(100));
  const train = (out: string) => [
    "train", "--config", config, "--data", data, "--out", join(folder, out), "--batch", "1", "--seqlen", "16",
    "--eval-rows", "1", "--steps", "2", "--json",
  ];
  const losses = (text: string) =>
    jsonLines(text).flatMap(({ loss }) => typeof loss === "number" ? [loss] : []);
  const [plain, whole] = [
    await krait(train("bare"), undefined, bare(folder)), await here(train("whole")),
  ];
  expect(plain.code, plain.stderr).toBe(0);
  expect(whole.code, whole.stderr).toBe(0);
  const [found, expected] = [losses(plain.stdout), losses(whole.stdout)];
  expect(found.length).toBeGreaterThanOrEqual(2);
  found.forEach((loss, i) => expect(Math.abs(loss / expected[i]! - 1)).toBeLessThan(1e-4));
  const speak = await krait(
    ["generate", "--model", join(folder, "bare"), "--prompt", "a", "--max-tokens", "3", "--json"], undefined,
    bare(folder));
  expect(speak.code, speak.stderr).toBe(0);
  const spoken = JSON.parse(speak.stdout) as Record<string, number>;
  expect(spoken["first_token_ms"]).toBeGreaterThan(spoken["prefill_ms"]!);
  expect(spoken["compile_ms"]).toBeGreaterThan(0);
}), 120_000);

test("doctor, tune and bench work", () => withFolder(async (folder) => {
  const run = async (...args: string[]) => {
    const { code, stdout, stderr } = await krait([...args, "--json"], undefined, bare(folder));
    expect(code, `${args[0]}: ${stderr}`).toBe(0);
    return stdout;
  };
  const { ok, advice } = JSON.parse(await run("doctor")) as { ok: boolean; advice: string[] };
  expect(ok).toBe(true);
  for (const name of ["shader-f16", "subgroups", "timestamp-query"]) {
    expect(advice.some((line) => line.includes(`o ${name}`) || line.includes(`without ${name}`))).toBe(true);
  }
  const shapes = ["--config", writeConfig(folder), "--batch", "1", "--seqlen", "16", "--prompt", "8"];
  expect(JSON.parse(await run("tune", ...shapes, "--budget", "60s"))).toMatchObject({ undecided: 0 });
  expect(jsonLines(await run("bench", "overhead", "--runs", "1"))).toHaveLength(1);
  const { code, stderr } = await krait(["bench", "roofline"], undefined, bare(folder));
  expect(code).toBe(1);
  expect(stderr).toContain("The suite roofline needs timestamps");
}), 120_000);
