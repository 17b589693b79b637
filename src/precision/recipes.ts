/**
 * Training recipes of low precision, as data: in which format every factor of every product is rounded, what
 * stays higher, and what each named ingredient would be without.
 *
 * A linear layer has three products: fprop y = x W^T, dgrad dx = dy W, wgrad dW = dy^T x. Products are summed
 * in f32 from the rounded factors; master weights, gradients, moments, norms, the scan, the attention's own
 * products, the router, the embeddings and the head are f32 in every recipe.
 *
 * Sources: "Nemotron-H" (arXiv 2504.03624) for current scaling; "Pretraining Large Language Models with
 * NVFP4" (arXiv 2509.25149); the report of Nemotron 3 Super for what its NVFP4 keeps; Transformer Engine's
 * recipes for delayed scaling, blocks of 128 and MXFP8.
 */
import type { FakeFormat } from "../ops/fake_quantize.ts";

/** How a factor of a product is rounded. */
export interface Operand {
  readonly format: FakeFormat;
  /** "lines": along the sum, "tiles": squares, the same for W and its transpose. Default "lines". */
  readonly blocks?: "lines" | "tiles";
  /** At random instead of to the nearest. */
  readonly stochastic?: boolean;
  /** Rotated along the sum by the random Hadamard transform first: both factors, or neither. */
  readonly hadamard?: boolean;
  readonly scale_rule?: "floor" | "ceil";
  readonly whole_scale?: boolean;
}

/** The six roundings of a linear layer. Both factors of wgrad have blocks of one length. */
export interface Products {
  readonly fprop: { readonly x: Operand; readonly weight: Operand };
  readonly dgrad: { readonly dy: Operand; readonly weight: Operand };
  readonly wgrad: { readonly dy: Operand; readonly x: Operand };
}

/**
 * Layers at the ends of the backbone that run in bf16: shares of all layers, each at least one if above 0.
 */
export interface HighLayers {
  readonly first: number;
  readonly last: number;
}

export interface Recipe {
  readonly summary: string;
  /** Null: f32 throughout. */
  readonly products: Products | null;
  readonly high_layers: HighLayers;
  /**
   * Projections that run otherwise, by role ("attention" or "mamba.out_proj"; "mtp" is the whole prediction
   * block), and the recipe whose products they take.
   */
  readonly projections: Readonly<Record<string, "bf16" | "mxfp8">>;
  /** FP8: scales from the largest magnitudes of so many updates, the current one not among them. */
  readonly amax_history: number | null;
  /** From this share of the run on everything is bf16; 1: never. */
  readonly late_switch: number;
  /** What can be left out, by name, and what the recipe then has instead. */
  readonly ingredients: Readonly<Record<string, Ingredient>>;
}

export interface Ingredient {
  readonly summary: string;
  readonly without: Partial<Pick<Recipe, "high_layers" | "projections" | "amax_history" | "late_switch">> & {
    readonly products?: {
      readonly [product in keyof Products]?: {
        readonly [factor in keyof Products[product]]?: Partial<Operand>;
      };
    };
  };
}

const NOTHING_HIGH = {
  high_layers: { first: 0, last: 0 }, projections: {}, amax_history: null, late_switch: 1, ingredients: {},
} as const;

/** The same rounding for every factor. */
const all = (operand: Operand): Products => ({
  fprop: { x: operand, weight: operand }, dgrad: { dy: operand, weight: operand },
  wgrad: { dy: operand, x: operand },
});

/** E4M3 for what comes from the forward pass, E5M2 for gradients. */
const HYBRID: Products = {
  fprop: { x: { format: "fp8_e4m3" }, weight: { format: "fp8_e4m3" } },
  dgrad: { dy: { format: "fp8_e5m2" }, weight: { format: "fp8_e4m3" } },
  wgrad: { dy: { format: "fp8_e5m2" }, x: { format: "fp8_e4m3" } },
};
const E5M2_GRADIENTS: Ingredient = {
  summary: "gradients in E5M2, with more range, instead of E4M3",
  without: { products: { dgrad: { dy: { format: "fp8_e4m3" } }, wgrad: { dy: { format: "fp8_e4m3" } } } },
};

const FP4: Operand = { format: "nvfp4" };
const FP4_TILES: Operand = { format: "nvfp4", blocks: "tiles" };

export const RECIPES = {
  f32: { ...NOTHING_HIGH, summary: "no rounding", products: null },
  bf16: { ...NOTHING_HIGH, summary: "factors of all products in bf16", products: all({ format: "bf16" }) },
  "fp8-delayed": {
    ...NOTHING_HIGH, products: HYBRID, amax_history: 1024,
    summary: "one scale per tensor, from the largest magnitudes of the last 1024 updates",
    ingredients: {
      "e5m2-gradients": E5M2_GRADIENTS,
      "amax-history": {
        summary: "the largest magnitude of 1024 updates instead of the last one",
        without: { amax_history: 1 },
      },
    },
  },
  "fp8-current": {
    ...NOTHING_HIGH, products: HYBRID, high_layers: { first: 4 / 118, last: 4 / 118 },
    summary: "Nemotron-H: one scale per tensor, from its largest magnitude; first and last layers in bf16",
    ingredients: {
      "e5m2-gradients": E5M2_GRADIENTS,
      "high-layers": {
        summary: "the first and last layers in bf16", without: { high_layers: { first: 0, last: 0 } },
      },
    },
  },
  "fp8-blockwise": {
    ...NOTHING_HIGH, summary: "E4M3, scales for 1 x 128 of activations and gradients, 128 x 128 of weights",
    products: {
      fprop: { x: { format: "fp8_blockwise" }, weight: { format: "fp8_blockwise", blocks: "tiles" } },
      dgrad: { dy: { format: "fp8_blockwise" }, weight: { format: "fp8_blockwise", blocks: "tiles" } },
      wgrad: { dy: { format: "fp8_blockwise" }, x: { format: "fp8_blockwise" } },
    },
    ingredients: {
      "2d-scaling": {
        summary: "one scale for a tile of a weight, so that both directions see the same values",
        without: {
          products: { fprop: { weight: { blocks: "lines" } }, dgrad: { weight: { blocks: "lines" } } },
        },
      },
      "power-of-two-scales": {
        summary: "scales that are powers of two",
        without: {
          products: {
            fprop: { x: { whole_scale: true }, weight: { whole_scale: true } },
            dgrad: { dy: { whole_scale: true }, weight: { whole_scale: true } },
            wgrad: { dy: { whole_scale: true }, x: { whole_scale: true } },
          },
        },
      },
    },
  },
  mxfp8: {
    ...NOTHING_HIGH, summary: "E4M3 with a power of two for 32 neighbours along the sum",
    products: all({ format: "mxfp8_e4m3" }),
    ingredients: {
      "round-up-scales": {
        summary: "scales that keep the largest magnitude from saturating",
        without: {
          products: {
            fprop: { x: { scale_rule: "floor" }, weight: { scale_rule: "floor" } },
            dgrad: { dy: { scale_rule: "floor" }, weight: { scale_rule: "floor" } },
            wgrad: { dy: { scale_rule: "floor" }, x: { scale_rule: "floor" } },
          },
        },
      },
    },
  },
  nvfp4: {
    summary: "E2M1, an E4M3 scale for 16 neighbours, one for the tensor; high parts as in Nemotron 3 Super",
    products: {
      fprop: { x: FP4, weight: FP4_TILES },
      dgrad: { dy: { ...FP4, stochastic: true }, weight: FP4_TILES },
      wgrad: { dy: { ...FP4, stochastic: true, hadamard: true }, x: { ...FP4, hadamard: true } },
    },
    high_layers: { first: 0, last: 0.15 },
    projections: { attention: "bf16", latent: "bf16", mtp: "bf16", "mamba.out_proj": "mxfp8" },
    amax_history: null, late_switch: 0.82,
    ingredients: {
      hadamard: {
        summary: "the random Hadamard transform of both factors of weight gradients",
        without: { products: { wgrad: { dy: { hadamard: false }, x: { hadamard: false } } } },
      },
      "stochastic-rounding": {
        summary: "gradients rounded at random",
        without: { products: { dgrad: { dy: { stochastic: false } }, wgrad: { dy: { stochastic: false } } } },
      },
      "2d-scaling": {
        summary: "one scale for a tile of 16 x 16 of a weight, so that both directions see the same values",
        without: {
          products: { fprop: { weight: { blocks: "lines" } }, dgrad: { weight: { blocks: "lines" } } },
        },
      },
      "high-layers": {
        summary: "the last layers in bf16", without: { high_layers: { first: 0, last: 0 } },
      },
      "high-projections": {
        summary: "attention, latent projections and prediction block in bf16, Mamba's output in MXFP8",
        without: { projections: {} },
      },
      "late-switch": { summary: "the last 18 % of the run in bf16", without: { late_switch: 1 } },
    },
  },
} as const satisfies Readonly<Record<string, Recipe>>;

export type RecipeName = keyof typeof RECIPES;
export const RECIPE_NAMES = Object.keys(RECIPES) as readonly RecipeName[];
