"""The two forms of the site. Neither touches the database, so an async view may validate them too."""

from django import forms

from .means import MEANS, POLICIES
from .models import Member


class SignUpForm(forms.Form):
    """One person who signs up."""

    name = forms.CharField(max_length=80, widget=forms.TextInput(attrs={"autocomplete": "name"}))
    email = forms.EmailField(widget=forms.EmailInput(attrs={"autocomplete": "email"}))


class BurstForm(forms.Form):
    """Many people who sign up at once."""

    how = forms.ChoiceField(choices=[(how.value, how.label) for how in MEANS | POLICIES])
    count = forms.IntegerField(min_value=1, max_value=5000)

    def clean_how(self) -> Member.How:
        """Return the choice as a `Member.How`."""
        return Member.How(self.cleaned_data["how"])
