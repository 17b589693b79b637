/** Runs that start from the weights of a checkpoint. */
import { cpSync, existsSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { serialiseConfig } from "../../src/models/config.ts";
import { SMALL } from "../support/layouts.ts";
import { here, jsonLines, krait, withFolder } from "./krait.ts";

const DENSE = {
  ...SMALL, vocab_size: 264, hybrid_override_pattern: "M*-", num_hidden_layers: 3,
  mtp_hybrid_override_pattern: "*-",
};
const TEXT = Array.from({ length: 12 }, (_, i) => `Line ${i} of a text, ${i * i} words long.`).join("\n\n");

test("train --init starts from a checkpoint, upcycled or on other ranks, and refuses what does not fit", () =>
  withFolder(async (folder) => {
    const file = (...names: string[]) => join(folder, ...names);
    writeFileSync(file("dense.json"), serialiseConfig(DENSE));
    writeFileSync(file("text.txt"), TEXT);
    const line = (out: string) => [
      "train", "--data", file("text.txt"), "--out", file(out), "--batch", "2", "--seqlen", "16",
    ];
    const train = (out: string, ...more: string[]) => here([
      ...line(out), "--steps", "1", "--json", ...more,
    ]);
    const first = await train("dense", "--config", file("dense.json"), "--steps", "2");
    expect(first.code, first.stderr).toBe(0);
    const loss = (run: { stdout: string }) =>
      jsonLines(run.stdout).find((line) => "val_loss" in line)!["val_loss"] as number;
    const weights = (run: string) => readFileSync(
      file(run, readdirSync(file(run)).find((name) => name.startsWith("step-"))!, "model.safetensors"));

    const still = ["--lr", "1e-60"]; // 0 in f32: the run ends with what it started from
    // Nobody has to read what it says; with nobody to read its numbers it saves and ends.
    const [blind, deaf] = await Promise.all([
      krait([...line("blind"), "--steps", "1", "--config", file("dense.json")], undefined, {}, (child) =>
        child.stderr!.destroy()),
      krait([...line("deaf"), "--steps", "100000", "--config", file("dense.json"), "--json"], (_, child) =>
        child.stdout!.destroy()),
    ]);
    expect([blind.code, deaf.code]).toEqual([0, 130]);
    expect([existsSync(file("blind", "latest")), existsSync(file("deaf", "latest"))]).toEqual([true, true]);

    const again = await train("again", "--init", file("dense"), ...still, "--layout", "tp=2,pp=2");
    expect(again.code, again.stderr).toBe(0);
    const sums = (run: { stdout: string }) => jsonLines(run.stdout).find((line) => "collectives" in line)![
      "collectives"] as { group: string; bytes: number; at_most: boolean; milliseconds: number | null }[];
    expect([...new Set(sums(again).map(({ group }) => group))].sort()).toEqual(
      ["pp", "stage", "tp", "tp-dp-cp"]);
    expect(sums(again).map(({ at_most, milliseconds }) => at_most || milliseconds)).not.toContain(true);
    expect(weights("again").equals(weights("dense"))).toBe(true);
    const sparse = await here([
      "upcycle", "--model", file("dense"), "--experts", "4", "--topk", "2", "--out", file("experts"),
    ]);
    expect(sparse.code, sparse.stderr).toBe(0);
    // What a run asks of its routers and experts is nothing that an evaluation sees.
    const asked = {
      align: 4, bias_update: "sign", forced_balance: true, router_dtype: "bf16", router_jitter: 0.1,
      routing: "topk", weighing: "activation",
    };
    const flags = Object.entries(asked).flatMap(([name, value]) =>
      [`--${name.replace("_", "-")}`, ...value === true ? [] : [String(value)]]);
    const grown = await train(
      "grown", "--init", file("experts"), ...still, "--bias-rate", "0", "--layout", "dp=2,ep=2",
      "--log-collectives", file("log.jsonl"), ...flags);
    expect(grown.code, grown.stderr).toBe(0);
    const log = jsonLines(readFileSync(file("log.jsonl"), "utf8")) as unknown as {
      step: number; group: string; ranks: number[]; sent: number[]; bytes: number; room: number | null;
      milliseconds: number; clock: string;
    }[];
    for (const { step, ranks, sent, bytes, room, milliseconds, clock } of log) {
      expect([step, sent.length, sent.reduce((a, b) => a + b)]).toEqual([1, ranks.length, bytes]);
      expect(bytes).toBeLessThanOrEqual(room ?? bytes);
      expect(["gpu", "host"]).toContain(clock);
      expect(milliseconds).toBeGreaterThan(0);
    }
    const dispatched = log.filter(({ group, room }) => group === "ep" && room !== null);
    expect(dispatched.length).toBeGreaterThan(0);
    expect(dispatched.some(({ bytes, room }) => bytes < room!)).toBe(true);
    const ofAll = (list: readonly { bytes: number }[]) => list.reduce((total, { bytes }) => total + bytes, 0);
    expect(ofAll(sums(grown))).toBe(ofAll(log));
    const [step] = readdirSync(file("grown")).filter((name) => name.startsWith("step-"));
    const state: unknown = JSON.parse(readFileSync(file("grown", step!, "state.json"), "utf8"));
    expect(state).toMatchObject({ recipe: asked });
    expect(Math.abs(loss(grown) / loss(first) - 1)).toBeLessThan(1e-5);

    // Nor do experts without room for their tokens take anything along.
    const short = await train(
      "grown", "--resume", "--steps", "2", "--layout", "dp=2,ep=2,expert_budget=1");
    expect(short.code, short.stderr).toBe(1);
    expect(short.stderr).toMatch(
      /experts of backbone\.layers\.2\.mixer on rank \d got \d+ rows .* in step 2, /);
    expect(short.stderr).not.toMatch(/\n\s+at /);
    expect(readdirSync(file("grown")).filter((name) => name.startsWith("step-"))).toHaveLength(1);

    cpSync(file("experts"), file("other"), { recursive: true });
    writeFileSync(file("other", "config.json"), serialiseConfig({ ...DENSE, hidden_size: 48 }));
    cpSync(file("experts"), file("empty"), { recursive: true });
    rmSync(file("empty", "model.safetensors"));
    for (const [more, code, message] of [
      [["--init", file("dense"), "--resume"], 2, /--init .* cannot stand beside --resume/],
      [["--init", file("dense"), "--config", "tiny"], 2, /--init .* cannot stand beside --config/],
      [["--init", file("nowhere")], 2, /model folder .*nowhere does not exist/],
      [["--init", file("other")], 1, /other.*(expected|holds)/],
      [["--init", file("empty")], 1, /model\.safetensors/],
    ] as const) {
      const run = await train("none", ...more);
      expect(run.code, run.stderr).toBe(code);
      expect(run.stderr).toMatch(message);
      expect(run.stderr).not.toMatch(/\n\s+at /); // no stack
      expect(existsSync(file("none"))).toBe(false);
    }
  }), 120_000);
