"""What the verbs share: plan, inputs, operate, tune, measure, emit."""
