import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { decodeBytes } from "../../src/cli/bench/generate.ts";
import { benchLine } from "../../src/cli/bench/line.ts";
import { finishedRuns, gapsOf, type PrecisionLine, VARIANTS } from "../../src/cli/bench/precision.ts";
import { fillPage, newest, readLines } from "../../src/cli/bench/report.ts";
import { estimate, totals } from "../../src/cli/bench/roofline.ts";
import { stepFlops } from "../../src/cli/bench/train.ts";
import type { BufferView } from "../../src/gpu/gpu.ts";
import { countParameters, forwardFlops } from "../../src/models/accounting.ts";
import { preset } from "../../src/models/presets.ts";
import { makeRecipe } from "../../src/train/recipe.ts";
import { withFolder } from "../cli/krait.ts";

const times = [2, 3, 8];

describe("lines", () => {
  test("a rate, and its share of the ceiling that binds it", () => {
    const line = benchLine({
      suite: "kernels", case: "copy", times, unit: "GB/s", work: 6e6, bound: { by: "copy", work: 6e6 },
      details: { peers: 2, fine: 1.23456 },
    }, 8);
    expect(line).toEqual({
      suite: "kernels", case: "copy", ms: 3, min_ms: 2, max_ms: 8, runs: 3, rate: 2, unit: "GB/s",
      bound: "copy", achieved: 2, ceiling: 8, share: 0.25, peers: 2, fine: 1.235,
    });
  });

  test("tokens a second are held against the products that they need", () => {
    const line = benchLine(
      { suite: "train", case: "step", times, unit: "tokens/s", work: 600,
        bound: { by: "matmul", work: 3e9 } },
      2000);
    expect(line).toMatchObject({ rate: 200_000, achieved: 1000, share: 0.5 });
  });

  test("bytes have no time, a timer of coarse steps may find none, and neither makes an infinity", () => {
    expect(benchLine({ suite: "growth", case: "m", times: [], unit: "bytes", work: 123456 }, null))
      .toMatchObject({ ms: null, min_ms: null, max_ms: null, rate: 123456, share: null, bound: null });
    const line = benchLine(
      { suite: "roofline", case: "k", times: [0, 0], unit: "us", work: 4, bound: { by: "copy", work: 1 } },
        8);
    expect(line).toMatchObject({ ms: 0, rate: 0, achieved: null, share: null });
  });
});

test("operations and bytes of whole steps", () => {
  const tiny = preset("tiny");
  const recipe = makeRecipe({ batch: 2, seqlen: 9, accumulate: 3, mtp_depths: 2 });
  expect(stepFlops(tiny, recipe)).toBe(3 * 3 * 18 * forwardFlops(tiny, 5, 2));
  const dense = { ...tiny, num_nextn_predict_layers: 0, mtp_hybrid_override_pattern: "" };
  expect(stepFlops(dense, recipe)).toBe(3 * 3 * 18 * forwardFlops(dense, 5));
  const perPosition = 4 * 2 * tiny.num_key_value_heads * tiny.head_dim;
  expect(decodeBytes(tiny, 7) - decodeBytes(tiny, 0)).toBe(7 * perPosition);
  expect(decodeBytes(tiny, 0)).toBeGreaterThan(4 * countParameters(tiny).activeWithoutEmbeddings);
});

describe("the roofline", () => {
  const storages = new Map<number, { id: number }>();
  const view = (id: number, elements: number) => {
    const storage = storages.get(id) ?? { id };
    storages.set(id, storage);
    return { storage, byteOffset: 0, byteLength: 4 * elements } as BufferView;
  };
  const launched = (
    bind: Record<string, BufferView>, params: Record<string, number>, conditions: string[] = [],
  ) => ({ bind, params, conditions, recorded: true });

  test("a product: every tensor once, two operations per multiplication", () => {
    const bind = { a: view(1, 64), b: view(2, 128), c: view(3, 32), bias: view(2, 128) };
    expect(estimate("matmul/matmul_quad", "matmul_quad", launched(bind, { m: 4, n: 8, k: 16, batches: 3 })))
      .toEqual({ name: "matmul/matmul_quad", bytes: 4 * 224, flops: 2 * 4 * 8 * 16 * 3 });
    const grouped = launched(bind, { m: 4, n: 8, k: 16, batches: 3 }, ["grouped_k"]);
    expect(estimate("matmul/matmul_quad", "x", grouped))
      .toMatchObject({ name: "matmul/matmul_quad:x", flops: 2 * 4 * 8 * 16 });
  });

  test("experts that no row goes to are not read", () => {
    const bind = { x: view(1, 32), weight: view(2, 8 * 128), y: view(3, 16) };
    const { bytes } = estimate("matmul/matvec", "matvec", launched(bind, { m: 2, n: 8, k: 16, experts: 8 }));
    expect(bytes).toBe(4 * (32 + 2 * 128 + 16));
  });

  test("what a kernel leaves open stays open", () => {
    const bind = { ids: view(1, 4), weight: view(2, 4096), y: view(3, 64) };
    expect(estimate("elementwise/embedding", "embedding", launched(bind, {})))
      .toEqual({ name: "elementwise/embedding", bytes: null, flops: null });
  });

  test("launches add up by kernel, and a profile of other launches is refused", () => {
    const event = (name: string, durationUs: number) =>
      ({ name, durationUs, startUs: 0, workgroups: [1, 1, 1] as const });
    const events = [event("a", 1), event("b", 9), event("a", 2)];
    const estimates = [
      { name: "a", bytes: 10, flops: null }, { name: "b", bytes: null, flops: 7 },
      { name: "a", bytes: 20, flops: null }];
    expect(totals(events, estimates)).toEqual([
      { name: "b", count: 1, us: 9, bytes: null, flops: 7 },
      { name: "a", count: 2, us: 3, bytes: 30, flops: null },
    ]);
    expect(() => totals(events, estimates.slice(1))).toThrow("3 launches does not belong to the 2");
  });
});

describe("the report", () => {
  const line = (more: object) => JSON.stringify({ suite: "s", case: "c", adapter: "a", ...more });

  test("the newest result of a case counts, peers and adapters apart", () => {
    const text = [
      line({ ms: 1 }), line({ ms: 2, peer: "p" }), "", line({ ms: 3, adapter: "b" }), line({ ms: 4 }),
    ].join("\n");
    expect(newest(readLines(text, "f")).map(({ ms }) => ms)).toEqual([2, 3, 4]);
  });

  test.each(["{", "null", "3", '{"suite":"s","case":"c"}', '{"suite":1,"case":"c","adapter":"a"}'])(
    "%j is no result", (bad) => {
      expect(() => readLines(`${line({})}\n${bad}\n`, "f.jsonl")).toThrow(
        "f.jsonl, line 2: a result must be");
    });

  test("results go into the page, whatever they say", () => {
    const page = '<p>1</p><script type="application/json" id="results">[\n1\n]</script><p>2</p>';
    const lines = newest(readLines(line({ note: "</script>$&<b>" }), "f"));
    const filled = fillPage(page, lines);
    expect(filled.startsWith('<p>1</p><script type="application/json" id="results">[')).toBe(true);
    expect(filled.endsWith("]</script><p>2</p>")).toBe(true);
    const data = /id="results">([\s\S]*?)<\/script>/.exec(filled)![1]!;
    expect(JSON.parse(data)).toEqual(lines);
    expect(fillPage(filled, [])).toContain('id="results">[\n\n]</script>');
    expect(() => fillPage("<p>", lines)).toThrow("no element for the results");
  });
});

describe("the precision suite", () => {
  const line = (variant: string, seed: number, losses: number[], ms = 10): PrecisionLine => ({
    suite: "precision", case: `${variant}, seed ${seed}`, variant, seed, config: "tiny", steps: 10, batch: 8,
    seqlen: 128, data: "x", val_loss: losses.at(-1)!, curve: losses.map((loss, i) => [5 * i, loss]), ms,
  });

  test("gaps are to f32 of the same seed", () => {
    const [f32, low, ...rest] = gapsOf([
      line("f32", 0, [4, 3, 2]), line("f32", 1, [4, 2, 1]), line("mxfp8", 0, [4, 3.3, 2.02], 15),
      line("mxfp8", 1, [4, 2.2, 1.03], 25), line("mxfp8", 2, [9, 9, 9]),
    ]);
    expect(rest).toEqual([]);
    expect(f32).toMatchObject({ variant: "f32", seeds: 2, gap: 0, spread: 0, time: 1 });
    expect(low).toMatchObject({ variant: "mxfp8", seeds: 2, time: 2 });
    expect(low!.gap).toBeCloseTo(0.02, 12);
    expect(low!.spread).toBeCloseTo(0.01 * Math.SQRT2, 12);
    expect(low!.gap_before).toBeCloseTo(0.1, 12); // at step 5, since 10 is past the late switch
  });

  test("a run is looked for by all that makes it", () => withFolder(async (folder) => {
    const file = join(folder, "precision.jsonl");
    writeFileSync(file, `${JSON.stringify({ ...line("bf16", 0, [3, 2]), adapter: "lavapipe" })}\n`);
    const done = finishedRuns(file, "lavapipe");
    const { case: name, config, steps, batch, seqlen, data } = line("bf16", 0, [3, 2]);
    const key = { case: name, config, steps, batch, seqlen, data };
    expect(done(key)?.val_loss).toBe(2);
    for (const change of [{ steps: 11 }, { data: "y" }, { config: "toy-moe" }, { case: "bf16, seed 1" }]) {
      expect(done({ ...key, ...change })).toBeNull();
    }
    expect(finishedRuns(file, "swiftshader")(key)).toBeNull();
    expect(finishedRuns(undefined, "lavapipe")(key)).toBeNull();
  }));

  test("every ingredient of nvfp4 is left out once", () => {
    expect(VARIANTS.map(({ name }) => name)).toEqual([
      "f32", "bf16", "fp8-current", "mxfp8", "nvfp4", "nvfp4 without hadamard",
      "nvfp4 without stochastic-rounding", "nvfp4 without 2d-scaling", "nvfp4 without high-layers",
      "nvfp4 without high-projections", "nvfp4 without late-switch",
    ]);
  });
});
