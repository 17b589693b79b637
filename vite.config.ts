/**
 * Builds the package: `dist/node` (reads `shaders/` from disk) and `dist/web` (WGSL text inlined).
 * Declarations are written by `tsc -p tsconfig.build.json`; `npm run build` does both.
 */
import { defaultClientConditions, defaultServerConditions, defineConfig } from "vite";
import { codeHash } from "./src/kernel/sources.node.ts";

/** Pages cannot read their own code, and the tuner's measurements hold for one build. */
export const define = { KRAIT_CODE: JSON.stringify(codeHash()) };

const shared = {
  emptyOutDir: true,
  minify: false,
  sourcemap: true,
  target: "es2023",
} as const;
const output = { format: "es", entryFileNames: "[name].js", chunkFileNames: "[name]-[hash].js" } as const;
const external = [/^node:/, /^[a-z@](?!:)/i]; // bare names are the dependencies of package.json

export default defineConfig({
  publicDir: false,
  builder: {},
  define,
  environments: {
    ssr: {
      resolve: { conditions: [...defaultServerConditions] },
      build: {
        ...shared,
        ssr: true,
        outDir: "dist/node",
        rolldownOptions: {
          input: { index: "src/index.ts", cli: "src/cli/main.ts", reference: "src/reference/index.ts" },
          external,
          output,
        },
      },
    },
    client: {
      resolve: { conditions: [...defaultClientConditions] },
      build: {
        ...shared,
        outDir: "dist/web",
        rolldownOptions: {
          input: {
            index: "src/index.ts",
            reference: "src/reference/index.ts",
            worker: "src/worker/worker.ts",
          },
          preserveEntrySignatures: "strict",
          external,
          output,
        },
      },
    },
  },
});
