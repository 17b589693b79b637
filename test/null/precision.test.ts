import { describe, expect, test } from "vitest";
import { choosePrecision, planProducts, type Projection, recipeOf } from "../../src/precision/plan.ts";
import { type Products, RECIPE_NAMES, RECIPES } from "../../src/precision/recipes.ts";
import { rotated } from "../../src/reference/fake_quantize.ts";
import { makeRecipe } from "../../src/train/recipe.ts";

test("unknown names are refused with those there are", () => {
  expect(() => choosePrecision("fp5")).toThrow(/precision must be one of f32, bf16, .*nvfp4, found "fp5"/);
  expect(() => choosePrecision("nvfp4", ["hadamard", "luck"])).toThrow(
    /nvfp4 has the ingredients hadamard, stochastic-rounding, 2d-scaling, .*, found "luck"/);
  expect(() => choosePrecision("bf16", ["hadamard"])).toThrow(
    /bf16 has no ingredients to leave out, found "hadamard"/);
  expect(() => makeRecipe({ precision: "mxfp8", without: "round-up-scales,x" })).toThrow(/mxfp8.*found "x"/);
  expect(makeRecipe({ precision: "nvfp4", without: "2d-scaling, hadamard" }).without).toBe(
    "hadamard,2d-scaling");
});

describe("every ingredient, left out, changes the recipe and nothing else of it", () => {
  for (const name of RECIPE_NAMES) {
    for (const ingredient of Object.keys(RECIPES[name].ingredients)) {
      test(`${name} without ${ingredient}`, () => {
        const whole = recipeOf({ recipe: name, without: [] });
        const less = recipeOf(choosePrecision(name, [ingredient]));
        expect(less).not.toEqual(whole);
        const touched = Object.keys(whole.ingredients[ingredient]!.without);
        for (const key of Object.keys(whole) as (keyof typeof whole)[]) {
          if (!touched.includes(key)) expect(less[key]).toEqual(whole[key]);
        }
      });
    }
  }
});

test("both factors of a weight's gradient have blocks of one kind", () => {
  const all = RECIPE_NAMES.flatMap(
    (name) => [[], ...Object.keys(RECIPES[name].ingredients).map((one) => [one])]
    .map((without) => recipeOf({ recipe: name, without }).products));
  for (const products of all) {
    if (!products) continue;
    const { dy, x } = products.wgrad;
    expect([dy.hadamard ?? false, dy.blocks]).toEqual([x.hadamard ?? false, x.blocks]);
    expect(dy.format.replace("e5m2", "e4m3")).toBe(x.format);
  }
});

const projection = (role: string, layer: number, part: "backbone" | "mtp" = "backbone"): Projection =>
  ({ name: `${part}.${layer}.${role}`, role, part, layer });
const layers = [
  projection("mamba.in_proj", 0), projection("mamba.out_proj", 0), projection("attention.q_proj", 1),
  projection("latent.fc1_latent_proj", 2), projection("expert.up_proj", 2), projection("shared.up_proj", 2),
  projection("mtp.eh_proj", 0, "mtp"), projection("expert.up_proj", 1, "mtp"),
  projection("mlp.up_proj", 9), projection("mlp.up_proj", 8), projection("mlp.up_proj", 7),
];
const formats = (plan: Map<string, Products>) =>
  layers.map(({ name }) => plan.get(name)?.fprop.x.format ?? "f32");

test("nvfp4 keeps what Nemotron 3 Super keeps", () => {
  const { bf16: high, nvfp4: low, mx } = { bf16: "bf16", nvfp4: "nvfp4", mx: "mxfp8_e4m3" };
  expect(formats(planProducts(recipeOf(choosePrecision("nvfp4")), layers, 10))).toEqual(
    [low, mx, high, high, low, low, high, high, high, high, low]);
  expect(formats(planProducts(recipeOf(choosePrecision("nvfp4", ["high-layers"])), layers, 10))).toEqual(
    [low, mx, high, high, low, low, high, high, low, low, low]);
  expect(formats(planProducts(recipeOf(choosePrecision("nvfp4", ["high-projections"])), layers, 10))).toEqual(
    [low, low, low, low, low, low, low, low, high, high, low]);
});

test("fp8-current keeps at least one layer at either end", () => {
  const plan = planProducts(recipeOf(choosePrecision("fp8-current")), layers, 10);
  expect(plan.get("backbone.0.mamba.in_proj")!.fprop.x.format).toBe("bf16");
  expect(plan.get("backbone.9.mlp.up_proj")!.fprop.x.format).toBe("bf16");
  expect(plan.get("backbone.8.mlp.up_proj")!.dgrad.dy.format).toBe("fp8_e5m2");
  expect(planProducts(recipeOf(choosePrecision("f32")), layers, 10).size).toBe(0);
});

test("the rotation of 0 .. 15", () => {
  const rows = Array.from({ length: 16 }, (_, i) => Float64Array.of(i));
  expect(rotated(rows, 1).map((row) => row[0])).toEqual(
    [-14.5, -7.5, 6.5, -0.5, 6.5, -0.5, -14.5, 8.5, 7.5, 14.5, 0.5, 1.5, 0.5, -2.5, 9.5, -15.5]);
});

test("the rotation of both factors leaves their product as it is", () => {
  // Whole numbers so small that bf16 holds what they are rotated to.
  const of = (step: number) => Array.from({ length: 32 }, (_, i) =>
    Float64Array.from({ length: 3 }, (_, c) => ((i * step + 5 * c) % 7) - 3));
  const [x, y] = [of(3), of(4)];
  const product = (a: readonly Float64Array[], b: readonly Float64Array[]) =>
    Array.from({ length: 9 }, (_, at) =>
      a.reduce((sum, row, i) => sum + row[at % 3]! * b[i]![Math.floor(at / 3)]!, 0));
  const expected = product(x, y);
  expect(product(rotated(x, 3), rotated(y, 3))).toEqual(expected);
  expect(product(rotated(x, 3), y)).not.toEqual(expected);
});
