/** Which projection of a model runs in which formats under a recipe. */
import { UsageError } from "../tensor/errors.ts";
import { type Products, type Recipe, RECIPE_NAMES, type RecipeName, RECIPES } from "./recipes.ts";

/** A precision as a run asks for it. */
export interface PrecisionChoice {
  readonly recipe: RecipeName;
  /** Ingredients left out, in the order of the recipe. */
  readonly without: readonly string[];
}

/** A matrix of the model that linear layers multiply with. */
export interface Projection {
  /** Parameter name. */
  readonly name: string;
  /** FAMILY.NAME, such as "mamba.in_proj" or "expert.up_proj". */
  readonly role: string;
  readonly part: "backbone" | "mtp";
  readonly layer: number;
}

/** f32, which asks for nothing. */
export const FULL_PRECISION: PrecisionChoice = { recipe: "f32", without: [] };

/**
 * Checks names.
 * @throws UsageError for an unknown recipe, or an ingredient that the recipe does not have
 */
export function choosePrecision(recipe: string, without: readonly string[] = []): PrecisionChoice {
  if (!Object.hasOwn(RECIPES, recipe)) {
    throw new UsageError(`The precision must be one of ${RECIPE_NAMES.join(", ")}, found "${recipe}".`);
  }
  const name = recipe as RecipeName;
  const known = Object.keys(RECIPES[name].ingredients);
  for (const ingredient of without) {
    if (known.includes(ingredient)) continue;
    const has = known.length > 0 ? `the ingredients ${known.join(", ")}` : "no ingredients to leave out";
    throw new UsageError(`The precision ${name} has ${has}, found "${ingredient}".`);
  }
  return { recipe: name, without: known.filter((ingredient) => without.includes(ingredient)) };
}

/** The recipe without the ingredients that the choice leaves out. */
export function recipeOf({ recipe, without }: PrecisionChoice): Recipe {
  const whole: Recipe = RECIPES[recipe];
  return without.reduce<Recipe>((left, name) => {
    const { products, ...rest } = whole.ingredients[name]!.without;
    const changed = products && left.products ? merged(left.products, products) as Products : left.products;
    return { ...left, ...rest, products: changed };
  }, whole);
}

/** `changes` put into a tree of plain objects. */
function merged(tree: object, changes: object): object {
  const result: Record<string, unknown> = { ...tree };
  for (const [key, value] of Object.entries(changes)) {
    const old = result[key];
    result[key] = typeof value === "object" && value !== null && typeof old === "object" && old !== null
      ? merged(old, value as object) : value;
  }
  return result;
}

/**
 * The formats of every projection; those that stay f32 are missing.
 * @param layers  number of layers of the backbone
 */
export function planProducts(
  recipe: Recipe, projections: readonly Projection[], layers: number,
): Map<string, Products> {
  const { products, high_layers: { first, last } } = recipe;
  const plan = new Map<string, Products>();
  if (!products) return plan;
  const count = (share: number) => (share > 0 ? Math.max(1, Math.round(share * layers)) : 0);
  const [begin, end] = [count(first), layers - count(last)];
  for (const { name, role, part, layer } of projections) {
    const high = part === "backbone" && (layer < begin || layer >= end);
    const keys = [...(part === "mtp" ? ["mtp"] : []), role, role.split(".")[0]!];
    const special = keys.map((key) => recipe.projections[key]).find((found) => found !== undefined);
    const own = high ? "bf16" : special;
    plan.set(name, own ? RECIPES[own].products : products);
  }
  return plan;
}
