/** The roundings of a trained model: which of its projections run in which formats, and when that changes. */
import { layerSpecs } from "../models/config.ts";
import { listParameters, type Parameter } from "../models/checkpoint_names.ts";
import type { NemotronH } from "../models/nemotron_h.ts";
import { planProducts, type PrecisionChoice, type Projection, recipeOf } from "../precision/plan.ts";
import { Precision } from "../precision/precision.ts";
import { type Products, type Recipe, RECIPES } from "../precision/recipes.ts";

const FAMILIES: Readonly<Partial<Record<Parameter["kind"], string>>> = {
  mamba_linear: "mamba", attention_linear: "attention", mlp_linear: "mlp", shared_linear: "shared",
  expert: "expert", latent_linear: "latent", mtp_linear: "mtp",
};

/** The matrices of a model's linear layers, in the order of its parameters. */
export function listProjections(model: NemotronH): Projection[] {
  return listParameters(model.config).flatMap(({ name, kind, part, layer }) => {
    const family = FAMILIES[kind];
    if (!family || layer === null) return [];
    const role = `${family}.${name.replace(/\.weight$/, "").split(".").at(-1)!}`;
    return [{ name, role, part, layer }];
  });
}

export class TrainingPrecision {
  readonly #model: NemotronH;
  readonly #recipe: Recipe;
  readonly #seed: number;
  /** The update from which on everything is bf16. */
  readonly #switchAt: number;
  #current: { readonly late: boolean; readonly precision: Precision | null } | null = null;

  /** @param steps  updates of the whole run */
  constructor(model: NemotronH, choice: PrecisionChoice, steps: number, seed: number) {
    this.#model = model;
    this.#recipe = recipeOf(choice);
    this.#seed = seed;
    const { late_switch } = this.#recipe;
    this.#switchAt = late_switch < 1 ? Math.round(late_switch * steps) : Infinity;
  }

  /** The roundings of update number `update`; null: none. */
  at(update: number): Precision | null {
    const late = update >= this.#switchAt;
    if (this.#current?.late !== late) {
      this.#current?.precision?.dispose();
      this.#current = { late, precision: this.#make(late) };
    }
    return this.#current.precision;
  }

  dispose(): void {
    this.#current?.precision?.dispose();
    this.#current = null;
  }

  #make(late: boolean): Precision | null {
    const plan = this.plan(late);
    if (plan.size === 0) return null;
    const { device, parameters } = this.#model;
    const history = late ? null : this.#recipe.amax_history;
    return new Precision(device, plan, parameters, { seed: this.#seed, history });
  }

  /** Formats by parameter name, before the late switch or after it. */
  plan(late: boolean): Map<string, Products> {
    const recipe: Recipe = late ? RECIPES.bf16 : this.#recipe;
    return planProducts(recipe, listProjections(this.#model), layerSpecs(this.#model.config).length);
  }
}
