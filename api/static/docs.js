// Swagger UI on the description of the api; its dark colours are those of a class.

// The page's session is the authorization. Swagger would prepare the whole description, which takes
// more than a second, to draw a dialogue that asks for a key.
const withoutAuthorization = {
  components: { authorizeOperationBtn: () => null },
  statePlugins: {
    spec: {
      wrapSelectors: { securityDefinitions: () => () => null },
      wrapActions: {
        requestResolvedSubtree: (resolve) => (path) => (path.includes("securitySchemes") ? null : resolve(path)),
      },
    },
  },
};

const dark = matchMedia("(prefers-color-scheme: dark)");
const follow = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", follow);
follow();

SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  // All routes and schemas at once take seconds to draw.
  docExpansion: "none",
  defaultModelsExpandDepth: -1,
  syntaxHighlight: false,
  presets: [SwaggerUIBundle.presets.apis, SwaggerUIBundle.SwaggerUIStandalonePreset].filter(Boolean),
  plugins: [withoutAuthorization],
  layout: "BaseLayout",
  requestInterceptor: (sent) => {
    sent.headers["X-CSRF-Token"] = document.querySelector("meta[name=csrf-token]").content;
    return sent;
  },
});
