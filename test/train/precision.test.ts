import { afterAll, describe, expect, test } from "vitest";
import { openCheckpoint, saveCheckpoint } from "../../src/io/checkpoint_files.ts";
import { localFileLayer } from "../../src/io/files.node.ts";
import { NemotronH } from "../../src/models/nemotron_h.ts";
import { createParameters } from "../../src/models/parameters.ts";
import { preset } from "../../src/models/presets.ts";
import { cast } from "../../src/ops/cast.ts";
import { fake_quantize, FakeBatch, type FakeQuantizeOptions } from "../../src/ops/fake_quantize.ts";
import { grouped_linear } from "../../src/ops/grouped_linear.ts";
import { linear } from "../../src/ops/linear.ts";
import { onOneRank, Precision } from "../../src/precision/precision.ts";
import { choosePrecision, recipeOf } from "../../src/precision/plan.ts";
import { RECIPE_NAMES, RECIPES } from "../../src/precision/recipes.ts";
import * as ref from "../../src/reference/index.ts";
import { Tape } from "../../src/autograd/tape.ts";
import { openDevice } from "../../src/tensor/device.ts";
import { type NdArray, ndarray } from "../../src/tensor/ndarray.ts";
import { scope, unscoped } from "../../src/tensor/scope.ts";
import type { Tensor } from "../../src/tensor/tensor.ts";
import { checkpointFiles, restoreRun, savedRun } from "../../src/train/checkpoint.ts";
import { makeRecipe } from "../../src/train/recipe.ts";
import type { Batch } from "../../src/train/packing.ts";
import { TrainingRun } from "../../src/train/run.ts";
import { withFolder } from "../cli/krait.ts";
import { compare, Draw } from "../ops/suite.ts";
import { testAdapters } from "../support/adapters.ts";
import { SMALL, smallBatches, trainSmall, worstOf } from "../support/layouts.ts";

/** The arithmetic is tested op by op; one adapter is enough for how it is put together. */
const device = await openDevice({ adapter: (await testAdapters())[0]! });
afterAll(() => device.destroy());

const config = preset("unit");
const r = new Draw(3);
const tokens = Int32Array.from(r.integers([300], 0, config.vocab_size).data);
const corpus = { tokens, starts: Int32Array.from([0, 90, 160]), bytes: 300, scored: 297, eosId: 2 };

interface Changes {
  readonly steps?: number;
  readonly accumulate?: number;
  readonly recompute?: string;
  readonly weights?: "bf16";
  readonly master?: "f32" | "none";
}

function start(precision: string, without = "", more: Changes = {}) {
  const recipe = makeRecipe({
    steps: 12, batch: 2, seqlen: 20, warmup: 2, decay: 2, lr: 5e-3, precision, without, ...more,
  });
  const model = new NemotronH(config, createParameters(device, config, 1, recipe.weights));
  const run = new TrainingRun(model, recipe, corpus, corpus);
  return {
    run, recipe,
    step: async (count: number) => {
      const losses: number[] = [];
      for (let i = 0; i < count; i++) losses.push((await run.step()).total);
      return losses;
    },
    dispose() {
      run.dispose();
      model.dispose();
    },
  };
}

/** Losses of a run and of its text afterwards. */
async function losses(precision: string, without = "", steps = 3, more = {}): Promise<number[]> {
  const { run, step, dispose } = start(precision, without, more);
  const found = await step(steps);
  found.push((await run.evaluate()).loss);
  dispose();
  return found;
}

describe("every recipe", () => {
  for (const name of RECIPE_NAMES) {
    test(`${name} learns, repeats its bits and leaves no memory behind`, async () => {
      const before = device.pool.liveBytes;
      const first = await losses(name, "", 12);
      expect(device.pool.liveBytes).toBe(before);
      expect(first[12]).toBeLessThan(first[0]! - 0.15);
      expect(await losses(name, "", 2)).toEqual([...first.slice(0, 2), expect.any(Number)]);
      if (name !== "f32") expect(first).not.toEqual(await losses("f32", "", 12));
    });
  }
});

describe("what is left out makes a difference", () => {
  for (const name of RECIPE_NAMES) {
    for (const ingredient of Object.keys(RECIPES[name].ingredients)) {
      test(`${name} without ${ingredient}`, async () => {
        // A late switch shows at the end; a history when a magnitude has been larger before.
        const [steps, more] = ingredient === "late-switch" ? [4, { steps: 4 }]
          : ingredient === "amax-history" ? [6, {}] : [2, {}];
        // Powers of two are as good as one another but for the smallest values, which small models lack.
        const base = name === "fp8-blockwise" && ingredient === "2d-scaling" ? "power-of-two-scales," : "";
        const whole = await losses(name, base, steps, more);
        const less = await losses(name, base + ingredient, steps, more);
        expect(less).not.toEqual(whole);
        for (const [i, loss] of less.entries()) expect(Math.abs(loss - whole[i]!)).toBeLessThan(0.3);
      });
    }
  }
});

describe("a resumed run equals one that never stopped, bit for bit", () => {
  for (const name of ["fp8-delayed", "nvfp4"] as const) {
    test(name, () => withFolder(async (folder) => {
      const layer = localFileLayer();
      const whole = start(name);
      const expected = await whole.step(6);
      whole.dispose();
      const first = start(name);
      expect(await first.step(3)).toEqual(expected.slice(0, 3));
      await saveCheckpoint(layer, folder, 3, checkpointFiles(
        first.run, {}, savedRun(first.run, first.recipe)));
      first.dispose();
      const later = start(name);
      await restoreRun(later.run, (await openCheckpoint(layer, folder))!);
      expect(await later.step(3)).toEqual(expected.slice(3));
      later.dispose();
    }));
  }
});

test("recomputed blocks round as before, and micro-batches draw bits of their own", async () => {
  for (const name of ["nvfp4", "fp8-delayed"]) {
    expect(await losses(name, "", 3, { recompute: "full" })).toEqual(await losses(name));
  }
  const two = await losses("nvfp4", "", 2, { accumulate: 2 });
  expect(two.every(Number.isFinite)).toBe(true);
  expect(await losses("nvfp4", "", 2, { accumulate: 2 })).toEqual(two);
});

test("evaluating does not move the scales of later updates", async () => {
  const { run, step, dispose } = start("fp8-delayed");
  const found = await step(1);
  await run.evaluate();
  found.push(...await step(2));
  dispose();
  expect(found).toEqual((await losses("fp8-delayed", "", 3)).slice(0, 3));
});

const upload = (host: NdArray) => device.tensor(Float32Array.from(host.data), host.shape);
const download = async (tensor: Tensor) => ndarray(tensor.shape, Float64Array.from(await tensor.read()));

/** Rounding of a weight by a recipe, as `Precision` makes it. */
function roundingOf(weight: Tensor, recipe: "nvfp4" | "mxfp8" | "fp8-current") {
  const { products } = recipeOf({ recipe, without: [] });
  const precision = new Precision([[onOneRank(weight, products!, 0, 0)]], { seed: 1, history: null });
  precision.prepare(4, 5);
  precision.roundWeights();
  return { precision, rounding: precision.of(weight.key)!.rounding, products: products! };
}

describe("products of rounded factors against float64 of the decoded ones", () => {
  const counter = { shape: [4], data: Float64Array.of(1, 0, 5, 4) };
  const lookup = (values: NdArray, operand: object, blocks: string, stream: number, groups: unknown =
    null) => {
    const { stochastic, blocks: own, ...rest } = operand as { stochastic?: boolean; blocks?: string };
    return ref.fake_quantize(values, {
      ...rest, blocks: own === "tiles" ? "tiles" : blocks, groups,
      ...(stochastic ? { random: { counter, stream } } : {}),
    } as never);
  };
  const STREAM = 0x4000_0000;

  for (const recipe of ["nvfp4", "mxfp8", "fp8-current"] as const) {
    test(`linear, ${recipe}`, async () => {
      const [x, w, dy] = [r.normal([2, 19, 40]), r.normal([24, 40]), r.normal([2, 19, 24])];
      const weight = upload(w);
      const input = upload(x);
      weight.requiresGrad = input.requiresGrad = true;
      const { precision, rounding, products: { fprop, dgrad, wgrad } } = roundingOf(weight, recipe);
      const tape = new Tape();
      const y = tape.run(() => linear(input, weight, null, null, { rounding }));
      const gradients = tape.backward([y], [upload(dy)]);
      const rows = (a: NdArray) => ndarray([a.data.length / a.shape.at(-1)!, a.shape.at(-1)!], a.data);
      const [X, DY] = [rows(x), rows(dy)];
      const forward = ref.linear(lookup(X, fprop.x, "rows", 0), lookup(w, fprop.weight, "rows", 0), null);
      compare("y", await download(y), ndarray(y.shape, forward.data), 1e-6);
      const [dx] = ref.linear_vjp([lookup(DY, dgrad.dy, "rows", STREAM)], X,
        lookup(w, dgrad.weight, "columns", 0), null);
      compare("dx", await download(gradients.get(input.key)!), ndarray(x.shape, dx!.data), 1e-6);
      const [, dw] = ref.linear_vjp([lookup(DY, wgrad.dy, "columns", STREAM + 1)],
        lookup(X, wgrad.x, "columns", 0), w, null);
      compare("dw", await download(gradients.get(weight.key)!), dw!, 1e-6);
      precision.dispose();
    });

    test(`grouped_linear, ${recipe}`, async () => {
      const ends = [0, 18, 18, 35, 44];
      const [x, dy] = [r.normal([22, 20]), r.normal([44, 12])];
      const w = r.normal([4, 12, 20]);
      const order = Array.from({ length: 44 }, (_, i) => (i * 9) % 44);
      const back = order.map((_, choice) => order.indexOf(choice));
      const u32 = (values: number[]) => device.tensor(Uint32Array.from(values), [values.length]);
      const weight = upload(w);
      const input = upload(x);
      weight.requiresGrad = input.requiresGrad = true;
      const { precision, rounding, products: { fprop, dgrad, wgrad } } = roundingOf(weight, recipe);
      const permute = { slot_token: u32(order), token_slot: u32(back), topk: 2 };
      const tape = new Tape();
      const y = tape.run(() => grouped_linear(input, weight, u32(ends), { permute, rounding }));
      const gradients = tape.backward([y], [upload(dy)]);
      const offsets = ndarray([5], Float64Array.from(ends));
      const host = { slot_token: ndarray([44], Float64Array.from(order)), topk: 2 };
      // Every expert's matrix has a scale of its own.
      const each = (operand: object, blocks: string) => ndarray(
        w.shape, Float64Array.from([0, 1, 2, 3].flatMap(
        (e) => [...lookup(ndarray([12, 20], w.data.slice(240 * e, 240 * e + 240)), operand, blocks,
          0).data])));
      const sorted = (a: NdArray) => ndarray([44, 20], Float64Array.from(
        order.flatMap((choice) => Array.from(a.data.slice((choice >> 1) * 20, (choice >> 1) * 20 + 20)))));
      const forward = ref.grouped_linear(sorted(lookup(x, fprop.x, "rows", 0)), each(fprop.weight, "rows"),
        offsets);
      compare("y", await download(y), forward, 1e-6);
      const whole = wgrad.x.format.startsWith("fp8");
      const block = wgrad.x.format === "nvfp4" ? 16 : 32;
      const padded = whole ? offsets : ref.padded_offsets(offsets, block);
      const [, dw] = ref.grouped_linear_vjp(
        [lookup(dy, wgrad.dy, "columns", STREAM + 1, whole ? null : { offsets })],
        whole ? sorted(lookup(x, wgrad.x, "columns", 0)) : lookup(x, wgrad.x, "columns", 0,
          { offsets, permute: host }),
        w, padded);
      compare("dw", await download(gradients.get(weight.key)!), dw!, 1e-6);
      const [dslots] = ref.grouped_linear_vjp([lookup(dy, dgrad.dy, "rows", STREAM)], sorted(x),
        each(dgrad.weight, "columns"), offsets);
      const dx = new Float64Array(22 * 20);
      order.forEach((choice, s) => {
        for (let c = 0; c < 20; c++) dx[(choice >> 1) * 20 + c]! += dslots!.data[s * 20 + c]!;
      });
      compare("dx", await download(gradients.get(input.key)!), ndarray([22, 20], dx), 1e-6);
      precision.dispose();
    });
  }
});

test("a batch of weights rounds each as if it were alone", async () => {
  const shapes = [[33, 20], [3, 16, 24], [130, 8]];
  const matrices = [{ format: "nvfp4", blocks: "tiles" }, { format: "nvfp4", blocks: "columns" },
    { format: "mxfp8_e4m3", scale_rule: "floor" }, { format: "fp8_e4m3" }, { format: "bf16" },
    { format: "fp8_blockwise", blocks: "tiles", whole_scale: true }] satisfies FakeQuantizeOptions[];
  for (const options of matrices) {
    const x = shapes.map((shape) => upload(r.normal(shape)));
    const y = shapes.map((shape) => unscoped(() => device.zeros(shape)));
    const batch = new FakeBatch(device, x.map((tensor, i) => ({ x: tensor, y: y[i]!, slot: 0 })), options);
    scope(() => batch.record());
    for (const [i, tensor] of x.entries()) {
      const values = await tensor.read() as Float32Array;
      const [rows, cols] = shapes[i]!.slice(-2) as [number, number];
      const found = await y[i]!.read();
      for (let at = 0; at < values.length; at += rows * cols) {
        const alone = fake_quantize(device.tensor(values.slice(at, at + rows * cols), [rows, cols]), options);
        expect(found.slice(at, at + rows * cols)).toEqual(await alone.read());
      }
    }
    batch.dispose();
    // Halves are rounded as the same numbers in f32.
    const halves = x.map((tensor) => unscoped(() => cast(tensor, "bf16")));
    const from = new FakeBatch(
      device, halves.map((tensor, i) => ({ x: tensor, y: y[i]!, slot: 0 })), options);
    scope(() => from.record());
    for (const [i, tensor] of halves.entries()) {
      const found = await y[i]!.read();
      const [rows, cols] = shapes[i]!.slice(-2) as [number, number];
      const values = await cast(tensor, "f32").read() as Float32Array;
      for (let at = 0; at < values.length; at += rows * cols) {
        const alone = fake_quantize(device.tensor(values.slice(at, at + rows * cols), [rows, cols]), options);
        expect(found.slice(at, at + rows * cols)).toEqual(await alone.read());
      }
    }
    from.dispose();
  }
});

test("weights stored in bf16 are rounded as they are stored, with masters and without", async () => {
  for (const [master, recipe] of [["f32", "nvfp4"], ["none", "fp8-delayed"]] as const) {
    const before = device.pool.liveBytes;
    const more = { weights: "bf16", master } as const;
    const found = await losses(recipe, "", 6, more);
    expect(device.pool.liveBytes).toBe(before);
    expect(await losses(recipe, "", 2, more)).toEqual([...found.slice(0, 2), expect.any(Number)]);
    const whole = await losses(recipe, "", 6);
    expect(found).not.toEqual(whole);
    whole.forEach((loss, i) => expect(Math.abs(loss / found[i]! - 1)).toBeLessThan(0.02));
  }
});

test("stochastic rounding has the right mean", async () => {
  const x = device.tensor(Float32Array.from({ length: 64 }, (_, i) => (i % 16 === 0 ? 6 : (i - 32) / 6)), [
    4, 16]);
  const counter = device.tensor(Uint32Array.of(5, 6, 0, 0), [4]);
  const sums = new Float64Array(64);
  const draws = 400;
  for (let step = 0; step < draws; step++) {
    counter.write(Uint32Array.of(5, 6, step, 0));
    const y = fake_quantize(x, { format: "nvfp4", random: { counter, stream: 2 } });
    (await y.read()).forEach((value, i) => {
      sums[i]! += value / draws;
    });
    y.dispose();
  }
  const values = await x.read();
  let worst = 0;
  // A step of at most 2 has a deviation of at most 1 per draw; the mean of the 8 bits is 1 / 512 low.
  sums.forEach((mean, i) => {
    worst = Math.max(worst, Math.abs(mean - Math.sign(values[i]!) * Math.min(Math.abs(values[i]!), 6)));
  });
  expect(worst).toBeLessThan(4 / Math.sqrt(draws) + 2 / 256);
  const nearest = await fake_quantize(x, { format: "nvfp4" }).read();
  expect(Math.max(...nearest.map((value, i) => Math.abs(value - values[i]!)))).toBeGreaterThan(0.4);
});

test("a value that is not finite is not lost", async () => {
  for (const format of ["nvfp4", "mxfp8_e4m3", "fp8_e4m3", "fp8_blockwise"] as const) {
    const values = new Float32Array(32).fill(1);
    values[3] = Infinity;
    const found = await fake_quantize(device.tensor(values, [2, 16]), { format }).read();
    expect(found[3]).toBeNaN();
  }
});

/** Rows of so many tokens, each in another range of words, so that ranks see different magnitudes. */
function rows(seqlen: number, count: number): Batch[] {
  const r = new Draw(7);
  return Array.from({ length: count }, (_, n) => {
    const ids = Int32Array.from(r.integers([seqlen + 1], 0, SMALL.vocab_size).data, (id, t) =>
      (t < seqlen / 2 ? id : (n + id) % 8));
    return {
      batch: 1, seqlen, ids, labels: ids.slice(1), input_ids: ids.slice(0, -1),
      seq_idx: new Int32Array(seqlen), scored: seqlen,
    };
  });
}

/** Without experts; every piece that two ranks of tp hold is whole blocks of 16. */
const dense = {
  ...SMALL, hybrid_override_pattern: "M*-", num_hidden_layers: 3,
  mamba_num_heads: 32, mamba_head_dim: 2,
};
const without = (recipe: string, ...ingredients: string[]) => ({
  precision: choosePrecision(recipe, ingredients), mtp_depths: 0, seed: 9,
});

describe("low precision on ranks", () => {
  test("NVFP4 rotates and draws as one rank does: the codes of all products are those of one", async () => {
    const options = {
      ...without("nvfp4", "high-layers", "high-projections"), batch: 1, seqlen: 64, config: dense,
    };
    const batches = rows(64, 1);
    const one = await trainSmall(device, "tp=1", batches, options);
    const before = device.pool.liveBytes;
    const four = await trainSmall(device, "tp=2,cp=2", batches, options);
    expect(device.pool.liveBytes).toBe(before);
    // A single code that is another one, or one byte that is drawn otherwise, is 1e-3 at least.
    const { name, error } = worstOf(four.gradients, one.gradients);
    expect(error, name).toBeLessThan(1e-5);
    expect(four.steps[0]!.loss / one.steps[0]!.loss).toBeCloseTo(1, 6);
    const other = await trainSmall(device, "tp=2,cp=2", batches, { ...options, seed: 10 });
    expect(worstOf(other.gradients, one.gradients).error).toBeGreaterThan(1e-2);
  });

  test("FP8 has one scale for what ranks hold of a tensor, of all micro-batches where experts meet them",
    async () => {
      const options = without("fp8-current");
      const batches = smallBatches(2);
      const one = await trainSmall(device, "tp=1", batches, options);
      const two = await trainSmall(device, "cp=2,ep=2", batches, options);
      const { name, error } = worstOf(two.gradients, one.gradients);
      expect(error, name).toBeLessThan(1e-5);
      // Sums of tp in another order change single codes of what follows, and another scale most of them.
      const four = await trainSmall(device, "tp=2,dp=2,ep=4", batches, options);
      expect(Math.abs(four.steps[0]!.loss / one.steps[0]!.loss - 1)).toBeLessThan(1e-4);
    });

  test("refuses cuts through blocks", async () => {
    const start = (layout: string, recipe: string) =>
      trainSmall(device, layout, smallBatches(2), { ...without(recipe), config: dense });
    const before = device.pool.liveBytes;
    await expect(start("tp=2", "mxfp8")).rejects.toThrow(
      'breaks the rule "blocks of low precision lie on one rank": expected pieces of whole blocks of 32 in ' +
      "the outputs of backbone.layers.0.mixer.in_proj.weight, which tp = 2 cuts, found one of 16.");
    await expect(start("cp=2", "nvfp4")).rejects.toThrow(
      "expected whole blocks of 16 tokens of a row in each of 2 cp = 4 parts, for the gradient of " +
      "backbone.layers.0.mixer.in_proj.weight, found 8 of 2 x 32.");
    expect(device.pool.liveBytes).toBe(before);
  });
});
