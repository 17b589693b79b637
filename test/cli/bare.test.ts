/** Every command that computes, on an adapter that offers no more than WebGPU guarantees. */
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { fixture, jsonLines, krait, withFolder } from "./krait.ts";

const bare = (folder: string) => (
  { KRAIT_LIMITS: "default", KRAIT_TUNER: "", KRAIT_CACHE: join(folder, "cache") });
const micro = fixture("micro.json");

test("training, resuming and generating work, and agree with the whole adapter", () => withFolder(
  async (folder) => {
  const data = join(folder, "text.txt");
  writeFileSync(data, readFileSync(new URL("../../README.md", import.meta.url)));
  const train = (out: string, env: Record<string, string>, ...more: string[]) => krait([
    "train", "--config", micro, "--data", data, "--out", join(folder, out), "--batch", "1", "--seqlen", "32",
    "--eval-rows", "2", "--steps", "4", "--json", ...more,
  ], undefined, env);
  const losses = (text: string) =>
    jsonLines(text).flatMap(({ loss }) => typeof loss === "number" ? [loss] : []);
  const [plain, whole] = [await train("bare", bare(folder)), await train("whole", {})];
  expect(plain.code, plain.stderr).toBe(0);
  expect(whole.code, whole.stderr).toBe(0);
  const [found, expected] = [losses(plain.stdout), losses(whole.stdout)];
  expect(found.length).toBeGreaterThanOrEqual(4);
  found.forEach((loss, i) => expect(Math.abs(loss / expected[i]! - 1)).toBeLessThan(1e-4));
  const speak = await krait(
    ["generate", "--model", join(folder, "bare"), "--prompt", "a", "--max-tokens", "3", "--json"], undefined,
      bare(folder));
  expect(speak.code, speak.stderr).toBe(0);
  const spoken = JSON.parse(speak.stdout) as Record<string, number>;
  expect(spoken["first_token_ms"]).toBeGreaterThan(spoken["prefill_ms"]!);
  expect(spoken["compile_ms"]).toBeGreaterThan(0);
}), 240_000);

test("doctor, tune and bench work", () => withFolder(async (folder) => {
  const runs = [
    ["doctor", "--json"],
    ["tune", "--config", micro, "--batch", "1", "--seqlen", "16", "--prompt", "8", "--budget", "3s",
      "--json"],
    ["bench", "generate", "--config", micro, "--runs", "1", "--json"],
  ];
  for (const args of runs) {
    const { code, stdout, stderr } = await krait(args, undefined, bare(folder));
    expect(code, `${args[0]}: ${stderr}`).toBe(0);
    expect(stdout.length).toBeGreaterThan(10);
  }
}), 240_000);
