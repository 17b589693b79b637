import { defaultServerConditions } from "vite";
import { defineConfig } from "vitest/config";

// These load modules of their own in the place of others, which files that share a process would see.
const ALONE = ["test/device/failures.test.ts", "test/null/tuner_build.test.ts"];

export default defineConfig({
  // "source" makes the package's own name mean src/, so that tests and examples run without a build.
  resolve: { conditions: ["source", ...defaultServerConditions] },
  ssr: { resolve: { conditions: ["source", ...defaultServerConditions] } },
  test: {
    environment: "node",
    pool: "forks",
    maxWorkers: 2,
    testTimeout: 60_000,
    hookTimeout: 60_000,
    setupFiles: ["test/support/give_back.ts"],
    // What was measured on this machine must not decide which kernels the tests run.
    env: { KRAIT_TUNER: "off" },
    projects: [
      { extends: true, test: { name: "alone", include: ALONE } },
      // One process for many files: kernels that several want are compiled once (test/support/lending.ts).
      {
        extends: true,
        test: { name: "shared", include: ["test/**/*.test.ts"], exclude: ALONE, isolate: false },
      },
    ],
  },
});
