# One rule per stage. Every stage is always asked; its key decides whether there is anything to do.

STAGES := validate encode-latents encode-text train preview verify
.PHONY: $(STAGES)

quote = '$(subst ','\'',$(1))'
ARGUMENTS = --config $(call quote,$(RUN)) \
	$(if $(STORE),--store $(call quote,$(STORE))) \
	$(if $(RUNS),--runs $(call quote,$(RUNS))) \
	$(foreach each,$(SET),--set $(call quote,$(each))) \
	$(if $(FORCE),--force)
STAGE = $(BIN)/flux2-lora $@ $(ARGUMENTS)

all: verify

validate: install
	@$(STAGE)

encode-latents encode-text: validate
	@$(STAGE)

train: encode-latents encode-text
	@$(STAGE)

preview: train
	@$(STAGE)

verify: preview
	@$(STAGE) --quick
