import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { countParameters } from "../../src/models/accounting.ts";
import { serialiseConfig } from "../../src/models/config.ts";
import { preset } from "../../src/models/presets.ts";
import { here, krait, withFolder } from "./krait.ts";

interface Facts {
  readonly layout: string;
  readonly sizes: Record<string, unknown>;
  readonly world: number;
  readonly groups: Record<string, number[][]>;
  readonly ranks: Record<string, unknown>[];
  readonly stages: { readonly holds?: Record<string, unknown> }[];
  readonly schedule: { readonly live: number[]; readonly bubble: number };
  readonly pipeline_ranks?: Record<string, number>[];
}

test("groups, and for every rank its place and its groups", async () => {
  const { code, stdout, stderr } = await krait(["layout", "tp=2,cp=2,pp=2,ep=4", "--world", "16", "--json"]);
  expect(code, stderr).toBe(0);
  const facts = JSON.parse(stdout) as Facts;
  expect(facts).toMatchObject(
    { layout: "tp=2,cp=2,pp=2,dp=2,ep=4,etp=1", world: 16, sizes: { dp: 2, edp: 2 } });
  expect(facts.groups["ep"]).toEqual([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]);
  expect(facts.groups["pp"]).toHaveLength(8);
  expect(facts.ranks).toHaveLength(16);
  expect(facts.ranks[13]).toEqual({
    rank: 13, tp: 1, cp: 0, dp: 1, pp: 1, etp: 0, ep: 1, edp: 1, groups: expect.any(Object) as unknown,
  });
  for (const { rank, groups } of facts.ranks) {
    const own = Object.entries(groups as Record<string, number>);
    expect(own).toHaveLength(14);
    for (const [kind, i] of own) expect(facts.groups[kind]![i], kind).toContain(rank);
  }
  expect(facts.stages).toEqual([{ stage: 0, rank: 0, chunk: 0 }, { stage: 1, rank: 1, chunk: 0 }]);
  expect(facts.schedule).toMatchObject({ live: [2, 1], bubble: 0.5 });
  expect(facts.pipeline_ranks).toBeUndefined();
});

test("with a model: its stages, and what a rank holds and sends", () => withFolder(async (folder) => {
  mkdirSync(join(folder, "model"));
  writeFileSync(join(folder, "model", "config.json"), serialiseConfig(preset("unit")));
  const args = [
    "layout", "tp=2,pp=2,dp=2,ep=4,stages=ME*|-M", "--model", join(folder, "model"), "--batch", "1",
    "--seqlen", "8", "--micro-batches", "3",
  ];
  const [text, json] = await Promise.all([krait(args), here([...args, "--json"])]);
  expect(text.code, text.stderr).toBe(0);
  const lines = text.stdout.split("\n").map((line) => line.trim());
  expect(lines).toContain(
    "8 ranks, 2 pipeline ranks of 4: attention tp 2, cp 1, dp 2; experts etp 1, ep 4, edp 1");
  expect(lines).toContain("tp         [0 1] [2 3] [4 5] [6 7]");
  expect(lines.some((line) => /^6( +[0-9]){7} +\[6 7\] +\[4 6\] +\[4-7\] +\[2 6\]/.test(line))).toBe(true);
  expect(lines).toContain("0  ranks [0-3]  embedding, layers 0-2 ME*");
  expect(lines).toContain("1  ranks [4-7]  layers 3-4 -M, prediction block, head");
  expect(lines.some((line) => /^pipeline, send over pp, forward +768 B +0 B$/.test(line))).toBe(true);
  expect(lines.some((line) => /^activations +[\d.]+ KiB +[\d.]+ KiB$/.test(line))).toBe(true);
  expect(lines.some((line) => /^expert parameters/.test(line))).toBe(false);
  const { stages, pipeline_ranks: ranks } = JSON.parse(json.stdout) as Facts;
  expect(stages[1]!.holds).toEqual(
    { from: 3, to: 5, embedding: false, mtp: true, head: true, pattern: "-M" });
  const { total } = countParameters(preset("unit"));
  expect(ranks!.reduce((sum, { parameters }) => sum + parameters!, 0)).toBeLessThan(total);
  for (const rank of ranks!) {
    expect(rank["parameter_bytes"]).toBe(4 * rank["parameters"]!);
    expect(rank["sent_bytes"]).toBeGreaterThan(0);
    expect(rank["activation_bytes"]).toBeGreaterThan(0);
    // dp = 2 ranks share the state of dense parameters, and with tp = 2 that of those which all of them hold
    // whole; experts are on their own.
    const dense = rank["gradient_bytes"]! / 4 - rank["experts"]!;
    expect(rank["optimizer_bytes"]).toBeLessThan(8 * (dense / 2 + rank["experts"]!));
    expect(rank["optimizer_bytes"]).toBeGreaterThan(8 * (dense / 4 + rank["experts"]!));
  }
}));

test("bad input is refused with one sentence", async () => {
  const cases: [string[], string][] = [
    [["tp=2,pp=x"], "The layout's pp must be a whole number from 1 to 65536, found \"x\"."],
    [["tp=2,dp=2", "--world", "6"], "\"tp * cp * pp * dp is the world\": expected 6 ranks, found 2 * 1"],
    [["tp=4", "--model", "toy-moe"], "\"tp divides the Mamba groups\": expected n_groups in multiples of tp"],
    [["cp=2", "--model", "toy-moe", "--seqlen", "6"], "\"2 * cp divides the sequence\": expected seqlen in"],
    [["pp=2,vpp=2", "--micro-batches", "3"], "micro_batches mod 2 to be 0 or at least 2, found 3 mod 2 = 1."],
    [["pp=2,stages=Et|tL", "--model", "unit"], "\"there is one t for each layer\": expected 5 layers"],
    [["tp=1", "--model", "no-such"], "\"no-such\" is neither a preset"],
    [[], "The argument LAYOUT is missing"],
    [[""], "The layout must be key=value with commas between, such as tp=2,dp=2, found nothing."],
  ];
  await Promise.all(cases.map(async ([args, message]) => {
    const { code, stdout, stderr } = await here(["layout", ...args]);
    expect(code).toBe(2);
    expect(stdout).toBe("");
    expect(stderr).toContain("krait layout: ");
    expect(stderr).toContain(message);
    expect(stderr.trim().split("\n")).toHaveLength(2);
  }));
});
